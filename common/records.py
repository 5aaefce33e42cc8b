"""Records of a hospital as the numbers that every hospital agrees on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medfl.common.codes import level, number
from medfl.common.statistics import Moments, Shared
from medfl.common.study import Feature, RecordInput

Record = Mapping[str, str | None]


def plausible(feature: Feature, value: float) -> bool:
    """Whether a number lies in the study's range of it."""
    return feature.range is None or feature.range[0] <= value <= feature.range[1]


def levels_of(feature: Feature, shared: Shared) -> tuple[str, ...]:
    """The levels of a category, from the study or the prepare exchange, in sorted order."""
    if feature.levels is not None:
        return tuple(sorted(level(v) for v in feature.levels))
    return tuple(shared.levels.get(feature.name, ()))


def columns(record: RecordInput, shared: Shared) -> tuple[str, ...]:
    """Names of the network's inputs, in order: categories are one-hot, first level dropped."""
    names: list[str] = []
    for feature in record.features:
        if feature.kind == "number":
            names.append(feature.name)
        else:
            names += [f"{feature.name}={v}" for v in levels_of(feature, shared)[1:]]
        if record.missing == "indicator":
            names.append(f"{feature.name}?")
    return tuple(names)


def moments(record: RecordInput, rows: Sequence[Record]) -> dict[str, Moments]:
    """Sums of each scaled column over these records; missing values are not counted."""
    found = {}
    for feature in record.features:
        if feature.kind == "number":
            texts = [t for row in rows if (t := row[feature.name]) is not None]
            values = [n for n in map(number, texts) if plausible(feature, n)]
            array = np.array(values, dtype=np.float64)
            found[feature.name] = Moments(
                float(array.size), float(array.sum()), float(np.square(array).sum())
            )
    return found


def level_counts(record: RecordInput, rows: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Records a level of each category; missing values are not counted."""
    return {
        feature.name: dict(
            Counter(level(t) for row in rows if (t := row[feature.name]) is not None)
        )
        for feature in record.features
        if feature.kind == "category"
    }


def encode(record: RecordInput, rows: Sequence[Record], shared: Shared) -> NDArray[np.float32]:
    """Records as (N, F) float32, in the order of `columns`, scaled as the study says.

    Means and standard deviations come from `shared` ("site" scaling: the caller puts the site's
    own there). Missing values become 0 after scaling, the middle of the feature, and so do numbers
    beyond the study's range: none is moved to the range's end. So does a category's value that is
    in no hospital's training part: nothing was learned about it.

    Raises:
        CaseError: a number that is none.
    """
    blocks = [np.zeros((len(rows), 0))]
    for feature in record.features:
        texts = [row[feature.name] for row in rows]
        if feature.kind == "category":
            known = levels_of(feature, shared)
            texts = [v if t is not None and (v := level(t)) in known else None for t in texts]
        else:
            texts = [t if t is not None and plausible(feature, number(t)) else None for t in texts]
        missing = np.array([t is None for t in texts], dtype=bool)
        if feature.kind == "number":
            block = _scaled_number(record, feature, texts, shared)[:, None]
        else:
            block = _one_hot(record, feature, texts, shared)
        block[missing] = 0.0
        blocks.append(block)
        if record.missing == "indicator":
            blocks.append(missing[:, None].astype(np.float64))
    return np.concatenate(blocks, axis=1).astype(np.float32)


def _scaled_number(
    record: RecordInput, feature: Feature, texts: Sequence[str | None], shared: Shared
) -> NDArray[np.float64]:
    values = np.array([0.0 if t is None else number(t) for t in texts], dtype=np.float64)
    if record.scale in ("federated", "site"):
        return (values - shared.means[feature.name]) / shared.sds[feature.name]
    if record.scale == "range" and feature.ends is not None:
        low, high = feature.ends
        return 2 * (values - low) / (high - low) - 1
    return values


def _one_hot(
    record: RecordInput, feature: Feature, texts: Sequence[str | None], shared: Shared
) -> NDArray[np.float64]:
    known = levels_of(feature, shared)
    block = np.array([[float(t == v) for v in known[1:]] for t in texts], dtype=np.float64)
    block = block.reshape(len(texts), max(0, len(known) - 1))
    if record.scale in ("federated", "site"):
        names = [f"{feature.name}={v}" for v in known[1:]]
        mean = np.array([shared.means.get(n, 0.0) for n in names])
        sd = np.array([shared.sds.get(n, 1.0) for n in names])
        return np.asarray((block - mean) / sd)
    if record.scale == "range":
        return block - 0.5
    return block
