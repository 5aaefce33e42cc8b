"""Resampling along axes: linear for images, nearest for masks, on the same grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def linear(image: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
    """Scale the last len(size) axes to `size`; the outer edges of first and last voxel stay put.

    Shrinking widens the triangle to the step between samples, so that nothing aliases.
    """
    for axis, length in enumerate(size, start=image.ndim - len(size)):
        if image.shape[axis] != length:
            weights = _weights(image.shape[axis], length)
            moved = np.tensordot(weights, image, axes=(1, axis))
            image = np.moveaxis(moved, 0, axis)
    return np.ascontiguousarray(image)


def nearest(mask: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    """Scale the last len(size) axes to `size`, each voxel from the nearest one."""
    for axis, length in enumerate(size, start=mask.ndim - len(size)):
        if mask.shape[axis] != length:
            place = (np.arange(length) + 0.5) * (mask.shape[axis] / length)
            mask = np.take(mask, np.minimum(place.astype(np.intp), mask.shape[axis] - 1), axis)
    return np.ascontiguousarray(mask)


def _weights(length_in: int, length_out: int) -> NDArray[np.float32]:
    """(out, in) weights of a triangle around each output voxel's centre; rows sum to 1."""
    step = length_in / length_out
    centres = (np.arange(length_out) + 0.5) * step - 0.5
    # Beyond the first and last voxel the image continues with their values.
    width = max(step, 1.0)
    if width == 1.0:
        centres = np.clip(centres, 0, length_in - 1)
    distance = np.abs(np.arange(length_in)[None, :] - centres[:, None]) / width
    weights = np.clip(1 - distance, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)
