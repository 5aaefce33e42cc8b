"""A few good and bad cases for the report: pictures that stay in the hospital's folder."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.training.caseset import CaseSet
from medfl.common.study import Study
from medfl.common.tensors import write_atomic

Mask = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Example:
    """One picture: image (H, W) uint8, target and prediction likewise (or a 1-element class)."""

    key: str
    score: float
    image: NDArray[np.uint8]
    target: NDArray[Any]
    prediction: NDArray[Any]


class Gallery:
    """The best and the worst cases seen; memory does not grow with the number of cases."""

    def __init__(self, study: Study, each: int = 3) -> None:
        self._study, self._each = study, each
        self._kept: list[Example] = []

    def watch(self, cases: CaseSet, predictions: Iterable[Mask]) -> Iterator[Mask]:
        """Pass masks through, keeping pictures of the best and worst."""
        for i, mask in enumerate(predictions):
            image, target = np.asarray(cases.inputs[i]), np.asarray(cases.targets[i])
            where = _slice(target)
            self._offer(
                Example(
                    cases.keys[i],
                    _overlap(target, mask),
                    _grey(image[0][where]),
                    np.asarray(target[where], dtype=np.uint8),
                    np.asarray(mask[where]),
                )
            )
            yield mask

    def choose(self, cases: CaseSet, probability: NDArray[np.floating]) -> None:
        """Keep the cases with the surest right and the surest wrong prediction."""
        if self._study.task.multi_label:
            return
        for i in range(len(cases)):
            image, target = np.asarray(cases.inputs[i]), int(np.asarray(cases.targets)[i])
            p = probability[i]
            classes = np.array([1 - p[0], p[0]]) if len(p) == 1 else p
            picture = image[0] if image.ndim == 3 else image[0][_slice(image[0])]
            self._offer(
                Example(
                    cases.keys[i],
                    float(classes[target]),
                    _grey(picture),
                    np.array([target]),
                    np.array([int(classes.argmax())]),
                )
            )

    def save(self, path: Path, *, durable: bool = True) -> None:
        """Write examples.npz: image, target, prediction (n, ...), score, key (n,)."""
        if not self._kept:
            return
        shape = np.max([e.image.shape for e in self._kept], axis=0)
        stacks = {
            "image": np.stack([_pad(e.image, shape) for e in self._kept]),
            "target": np.stack([_pad(e.target, shape) for e in self._kept]),
            "prediction": np.stack([_pad(e.prediction, shape) for e in self._kept]),
            "score": np.array([e.score for e in self._kept]),
            "key": np.array([e.key for e in self._kept]),
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **stacks)
        write_atomic(path, buffer.getvalue(), durable=durable)

    def _offer(self, example: Example) -> None:
        kept = sorted([*self._kept, example], key=lambda e: e.score)
        n = self._each
        self._kept = kept if len(kept) <= 2 * n else kept[:n] + kept[-n:]


def _slice(target: NDArray[Any]) -> tuple[slice | int, ...]:
    """The axial slice with most foreground, or the whole of a 2-D picture."""
    if target.ndim == 2:
        return (slice(None), slice(None))
    filled = (target > 0).sum(axis=(0, 1))
    middle = target.shape[2] // 2
    return (slice(None), slice(None), int(filled.argmax()) if filled.any() else middle)


def _overlap(target: NDArray[Any], mask: NDArray[Any]) -> float:
    """Share of the foreground that agrees in class: 2 |agree| / (|target| + |mask|)."""
    total = int((target > 0).sum()) + int((mask > 0).sum())
    agree = int(((target == mask) & (target > 0)).sum())
    return 2 * agree / total if total else 1.0


def _grey(picture: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = np.percentile(picture, [1, 99])
    scaled = (picture.astype(np.float64) - low) / max(float(high - low), 1e-9)
    return np.asarray(np.clip(scaled, 0, 1) * 255, dtype=np.uint8)


def _pad(picture: NDArray[Any], shape: NDArray[np.int64]) -> NDArray[Any]:
    if picture.ndim == 1:
        return picture
    return np.pad(picture, [(0, int(s - p)) for s, p in zip(shape, picture.shape, strict=True)])
