"""From a checked cohort to the numbers of one part, the same way at every hospital."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import Arrays, Cohort, Split
from medfl.client.training.caseset import CaseSet
from medfl.common import records
from medfl.common.statistics import LocalStatistics, Moments, Shared, merge
from medfl.common.study import Study

# Above this a part is read from the cache case by case instead of being held in memory.
IN_MEMORY_BYTES = 256 * 2**20


class Selected(Sequence[NDArray[np.float32]]):
    """Some positions of a cohort's arrays, read when asked for, normalised on the way."""

    def __init__(
        self,
        arrays: Arrays | Sequence[NDArray[Any]],
        positions: NDArray[np.int64],
        shift: NDArray[np.float32] | None = None,
        scale: NDArray[np.float32] | None = None,
    ) -> None:
        self._arrays, self._positions = arrays, positions
        self._shift, self._scale = shift, scale

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> NDArray[np.float32]:  # type: ignore[override]
        array = np.asarray(self._arrays[int(self._positions[index])])
        if self._shift is not None and self._scale is not None:
            array = (array - self._shift) / self._scale
        return array


def local_statistics(study: Study, cohort: Cohort, *, private: bool) -> LocalStatistics:
    """This site's part of the prepare exchange, from its training cases alone.

    Only what the study needs is counted: a study with fixed ranges and plain losses learns nothing
    here but the number of cases.
    """
    train = cohort.positions("train")
    rows = [cohort.records[i] for i in train] if cohort.records else []
    features, levels = {}, {}
    if study.record is not None:
        if study.record.scale == "federated":
            features = records.moments(study.record, rows)
        open_levels = any(f.kind == "category" and f.levels is None for f in study.record.features)
        if study.record.scale == "federated" or open_levels:
            levels = records.level_counts(study.record, rows)
    needs_counts = (
        study.training.loss == "weighted_cross_entropy" and study.training.class_weights is None
    )
    return LocalStatistics(
        n_cases=len(train),
        class_counts=_class_counts(study, cohort, train) if needs_counts else (),
        features=features,
        levels=levels,
        intensity=_intensity(study, cohort, train),
        private=private,
    )


def case_set(study: Study, shared: Shared, cohort: Cohort, split: Split) -> CaseSet:
    """The cases of one part as numbers ready for the network."""
    positions = cohort.positions(split)
    cases = [cohort.cases[i] for i in positions]
    if study.record is not None:
        inputs: NDArray[np.float32] | Sequence[NDArray[np.float32]] = _encode_records(
            study, shared, cohort, positions
        )
    else:
        inputs = _select_images(shared, cohort.inputs, positions)
    targets: Any
    if study.task.kind == "segmentation":
        targets = _gather(Selected(cohort.targets, positions))
    else:
        targets = np.asarray(cohort.targets)[positions]
    return CaseSet(
        inputs=inputs,
        targets=targets,
        patients=tuple(c.patient for c in cases),
        keys=tuple(c.key for c in cases),
    )


def _encode_records(
    study: Study, shared: Shared, cohort: Cohort, positions: NDArray[np.int64]
) -> NDArray[np.float32]:
    record = study.record
    if record is None:
        raise TypeError("the study has no [record] table")
    if record.scale == "site":
        rows = [cohort.records[i] for i in cohort.positions("train")]
        own = merge(
            [
                LocalStatistics(
                    n_cases=len(rows),
                    features=records.moments(record, rows),
                    levels=records.level_counts(record, rows),
                )
            ]
        )
        shared = replace(shared, means=own.means, sds=own.sds)
    return records.encode(record, [cohort.records[i] for i in positions], shared)


def _select_images(
    shared: Shared, arrays: Arrays | Sequence[NDArray[Any]], positions: NDArray[np.int64]
) -> NDArray[np.float32] | Sequence[NDArray[np.float32]]:
    if not shared.channel_means or not len(positions):
        return _gather(Selected(arrays, positions))
    axes = (-1,) + (1,) * (np.asarray(arrays[int(positions[0])]).ndim - 1)
    shift = np.array(shared.channel_means, dtype=np.float32).reshape(axes)
    scale = np.array(shared.channel_sds, dtype=np.float32).reshape(axes)
    return _gather(Selected(arrays, positions, shift, scale))


def _gather(selected: Selected) -> NDArray[np.float32] | Selected:
    """One array where all cases have one shape and fit in memory, else `selected` itself."""
    if not len(selected):
        return selected
    first = selected[0]
    if first.nbytes * len(selected) > IN_MEMORY_BYTES:
        return selected
    arrays = [selected[i] for i in range(len(selected))]
    if any(a.shape != first.shape for a in arrays):
        return selected
    return np.stack(arrays)


def _class_counts(study: Study, cohort: Cohort, train: NDArray[np.int64]) -> tuple[float, ...]:
    n_classes = len(study.task.classes)
    counts = np.zeros(n_classes)
    for i in train:
        target = np.asarray(cohort.targets[int(i)])
        if study.task.multi_label:
            counts += target
        else:
            counts += np.bincount(target.reshape(-1), minlength=n_classes)[:n_classes]
    return tuple(float(c) for c in counts)


def _intensity(study: Study, cohort: Cohort, train: NDArray[np.int64]) -> tuple[Moments, ...]:
    if study.image is None or study.image.intensity != "federated":
        return ()
    sums = [Moments()] * study.image.channels
    for i in train:
        image = np.asarray(cohort.inputs[int(i)], dtype=np.float64)
        for c in range(study.image.channels):
            voxels = image[c]
            sums[c] += Moments(
                float(voxels.size), float(voxels.sum()), float(np.square(voxels).sum())
            )
    return tuple(sums)
