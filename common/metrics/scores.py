"""What the cases of one part of one site scored: the numbers from which every metric is made."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medfl.common import tensors
from medfl.common.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

DICE, HD95, SURFACE = "dice", "hd95", "surface_distance"
# Of the cases without a structure, those in which the model marks some of it.
EMPTY = "empty_false_positives"


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Case by case, what a model did on a validation or test part.

    keys, patients: keyed hashes, one a case; they stay on the hospital's machine.
    columns: arrays whose first axis is the case.
        Classification and risk: `target` (N,) int64 class index, multi-label (N, K) float32;
        `probability` (N, 1) of the positive class, or (N, C).
        Segmentation: `dice/<class>`, `empty_false_positives/<class>`, and where distances were
        asked for `hd95/<class>` and `surface_distance/<class>` in millimetres (voxels without a
        spacing), (N,) float64 for each foreground class; nan where undefined.
    """

    keys: tuple[str, ...]
    patients: tuple[str, ...]
    columns: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        lengths = {"patients": len(self.patients)} | {n: len(a) for n, a in self.columns.items()}
        wrong = [name for name, length in lengths.items() if length != len(self.keys)]
        if wrong:
            raise ValueError(f"{len(self.keys)} keys, but another length in {', '.join(wrong)}")

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, path: Path, *, durable: bool = True) -> None:
        """Write an .npz of one table, `cases`, in one atomic step. Raises StorageError.

        One record a case, without pickled objects; one table, because opening many arrays in many
        files takes longer than what is done with them.
        """
        words = {"key": np.array(self.keys, np.str_), "patient": np.array(self.patients, np.str_)}
        fields = {**words, **self.columns}
        table = np.empty(len(self), [(n, a.dtype, a.shape[1:]) for n, a in fields.items()])
        for name, column in fields.items():
            table[name] = column
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, cases=table)
        tensors.write_atomic(path, buffer.getvalue(), durable=durable)


def load(path: Path) -> Scores:
    """Read what `Scores.save` wrote.

    Raises:
        StorageError: missing, damaged, or holding pickled objects, which are never opened.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            table = file["cases"]
        columns = {n: table[n].copy() for n in table.dtype.names if n not in ("key", "patient")}
        return Scores(tuple(table["key"].tolist()), tuple(table["patient"].tolist()), columns)
    except FileNotFoundError:
        raise StorageError(f"{path}: there is no such file; evaluate the model first") from None
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise StorageError(
            f"{path}: is not a whole file of scores ({error}). Remove it and evaluate again"
        ) from None


def concatenate(parts: Sequence[Scores]) -> Scores:
    """The cases of several parts in one, in order; all must hold the same columns."""
    names = set(parts[0].columns)
    if any(set(part.columns) != names for part in parts):
        raise ValueError("Scores with different columns cannot be joined")
    return Scores(
        keys=tuple(key for part in parts for key in part.keys),
        patients=tuple(patient for part in parts for patient in part.patients),
        columns={n: np.concatenate([p.columns[n] for p in parts]) for n in parts[0].columns},
    )


def score_classification(
    keys: Sequence[str],
    patients: Sequence[str],
    target: NDArray[Any],
    probability: NDArray[Any],
) -> Scores:
    """Scores of a classification or a risk.

    target: (N,) class index, or (N, K) of 0 and 1 for multi-label.
    probability: (N,) or (N, 1) of the positive class, or (N, C).
    """
    return Scores(
        tuple(keys),
        tuple(patients),
        {
            "target": target.astype(np.int64) if target.ndim == 1 else target,
            "probability": probability[:, None] if probability.ndim == 1 else probability,
        },
    )


def score_masks(
    keys: Sequence[str],
    patients: Sequence[str],
    targets: Iterable[NDArray[np.uint8]],
    predictions: Iterable[NDArray[np.uint8]],
    classes: Sequence[str],
    spacings: Iterable[Sequence[float] | None] | None,
    distances: bool,
) -> Scores:
    """Scores of a segmentation; at any time one case's masks are in memory.

    targets, predictions: (*spatial) masks, value k is `classes[k]`, 0 the background.
    spacings: millimetres along each axis, one a case; None counts distances in voxels.
    """
    foreground = list(enumerate(classes))[1:]
    measures = (DICE, EMPTY, HD95, SURFACE) if distances else (DICE, EMPTY)
    rows: list[list[float]] = []
    for target, prediction, spacing in zip(
        targets, predictions, repeat(None) if spacings is None else spacings, strict=False
    ):
        rows.append(
            [
                value
                for k, _ in foreground
                for value in _compare(target == k, prediction == k, spacing, distances)
            ]
        )
    names = [f"{measure}/{name}" for _, name in foreground for measure in measures]
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(names))
    columns = {name: table[:, i].copy() for i, name in enumerate(names)}
    return Scores(tuple(keys), tuple(patients), columns)


def _compare(
    target: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing: Sequence[float] | None,
    distances: bool,
) -> Iterator[float]:
    """Dice, false positive on an empty mask, 95th percentile Hausdorff and surface distance.

    Of one class; nan where undefined. Where the truth lacks the class there is nothing to overlap:
    Dice is undefined whatever the model says, so that rounds and models are compared over the
    same cases, and the false positive is 1 where it marks anything, else 0. Where the model
    alone lacks it, Dice is 0 and the distances, which no finite number describes, are nan.
    """
    import torch
    from monai.metrics.meandice import compute_dice

    in_target, in_prediction = bool(target.any()), bool(prediction.any())
    if not (in_target and in_prediction):
        yield 0.0 if in_target else float("nan")
        yield float("nan") if in_target else float(in_prediction)
        if distances:
            yield from (float("nan"), float("nan"))
        return
    y, y_pred = (torch.from_numpy(mask[None, None]) for mask in (target, prediction))
    yield float(compute_dice(y_pred.float(), y.float(), include_background=True)[0, 0])
    yield float("nan")
    if distances:
        yield from _distances(y_pred, y, None if spacing is None else [float(s) for s in spacing])


def _distances(y_pred: Tensor, y: Tensor, spacing: list[float] | None) -> tuple[float, float]:
    """95th percentile Hausdorff and mean symmetric surface distance of (1, 1, *spatial) masks."""
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_distance import compute_average_surface_distance

    with warnings.catch_warnings():
        # MONAI 1.6 calls itself with an argument that it has deprecated.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        hd95 = compute_hausdorff_distance(
            y_pred, y, include_background=True, percentile=95, spacing=spacing
        )
        surface = compute_average_surface_distance(
            y_pred, y, include_background=True, symmetric=True, spacing=spacing
        )
    return float(hd95[0, 0]), float(surface[0, 0])
