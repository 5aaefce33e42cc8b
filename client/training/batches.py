"""From cases to batches: which cases, in which order, cut to which patch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from medfl.client.training.caseset import CaseSet
from medfl.common.study import Study

Batch = tuple[NDArray[np.generic], NDArray[np.generic]]


def shuffled_batches(
    n_cases: int, batch_size: int, seed: int, at_least: int = 1
) -> Iterator[NDArray[np.int64]]:
    """Endless batches of positions: every case once an epoch, each epoch in a new order.

    The last batch of an epoch may be smaller; below `at_least` it is left out, unless it is the
    epoch's only one.
    """
    order = np.random.default_rng(seed)
    while True:
        positions = order.permutation(n_cases)
        for start in range(0, n_cases, batch_size):
            if start == 0 or n_cases - start >= at_least:
                yield positions[start : start + batch_size]


def batch_of(
    cases: CaseSet,
    positions: NDArray[np.int64],
    study: Study,
    rngs: Iterable[np.random.Generator],
) -> Batch:
    """Inputs (B, ...) and targets of some cases, copied; random patches where sizes differ.

    rngs: for each case the generator of its patch.
    """
    if study.image is not None and study.image.fit == "keep":
        return _patches(cases, positions, tuple(study.image.size), rngs)
    return rows(cases.inputs, positions), rows(cases.targets, positions)


def rows(
    arrays: NDArray[np.generic] | Sequence[NDArray[np.generic]], positions: NDArray[np.int64]
) -> NDArray[np.generic]:
    """Some rows of one array, or of a sequence of arrays of one shape."""
    if isinstance(arrays, np.ndarray):
        return arrays[positions]
    return np.stack([arrays[int(i)] for i in positions])


def _patches(
    cases: CaseSet,
    positions: NDArray[np.int64],
    size: tuple[int, ...],
    rngs: Iterable[np.random.Generator],
) -> Batch:
    pairs = [
        random_patch(cases.inputs[int(i)], np.asarray(cases.targets[int(i)]), size, rng)
        for i, rng in zip(positions, rngs, strict=False)
    ]
    return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])


def random_patch(
    image: NDArray[np.generic],
    mask: NDArray[np.generic],
    size: tuple[int, ...],
    rng: np.random.Generator,
) -> Batch:
    """A patch of `size` voxels of an image (C, *spatial) and its mask (*spatial).

    Half of the patches are placed around a random foreground voxel, if there is one. Images
    smaller than `size` are padded around by their lowest value, masks by background.
    """
    image, mask = pad_to(image, size), pad_to(mask[None], size, value=0)[0]
    highest = [side - s for side, s in zip(mask.shape, size, strict=True)]
    start = [int(rng.integers(h + 1)) for h in highest]
    if rng.random() < 0.5 and (foreground := np.flatnonzero(mask)).size:
        voxel = np.unravel_index(int(rng.choice(foreground)), mask.shape)
        start = [
            int(np.clip(v - rng.integers(s), 0, h))
            for v, s, h in zip(voxel, size, highest, strict=True)
        ]
    window = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
    return image[(slice(None), *window)], mask[window]


def pad_to(
    array: NDArray[np.generic], size: tuple[int, ...], value: float | None = None
) -> NDArray[np.generic]:
    """(C, *spatial) with every side at least `size`, the original in the middle."""
    missing = [max(0, s - side) for side, s in zip(array.shape[1:], size, strict=True)]
    if not any(missing):
        return array
    widths = [(0, 0), *((m // 2, m - m // 2) for m in missing)]
    filler = float(array.min()) if value is None else value
    return np.pad(array, widths, constant_values=filler)
