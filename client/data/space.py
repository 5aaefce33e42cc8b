"""One physical space: pictures of one case brought onto one grid, without interpolation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import Picture
from medfl.common.errors import CaseError

Affine = NDArray[np.float64]


def onto(picture: Picture, target: Picture, dimensions: int, reason: str) -> Picture:
    """A picture turned (axes exchanged or flipped) onto the grid of another, by their affines.

    picture, target: their last `dimensions` axes are spatial. A picture without affine goes by its
    rows and columns. Grids agree where every corner lies within a tenth of a voxel.

    Raises:
        CaseError: `reason` where the pictures are no one grid, or only `picture` says where it is.
    """
    shape = target.array.shape[-dimensions:]
    if picture.affine is None:
        return _of_shape(picture, shape, reason)
    if target.affine is None:
        raise CaseError(reason, "one file says where it lies in the body, the other does not")
    steps, wanted = picture.affine[:3, :dimensions], target.affine[:3, :dimensions]
    turn = np.linalg.pinv(steps) @ wanted
    whole = np.rint(turn).astype(int)
    if (np.abs(whole).sum(axis=0) != 1).any() or (np.abs(whole).sum(axis=1) != 1).any():
        raise CaseError(reason, "the grids differ in direction or voxel size")
    turned, affine = _turned(picture, picture.affine, whole)
    turned = _of_shape(turned, shape, reason)
    far = _distance(affine, target.affine, shape)
    if far > 0.1 * float(np.linalg.norm(wanted, axis=0).min()) + 1e-3:
        raise CaseError(reason, f"the grids lie up to {far:.1f} mm apart")
    return turned


def _of_shape(picture: Picture, shape: tuple[int, ...], reason: str) -> Picture:
    if picture.array.shape[-len(shape) :] != shape:
        raise CaseError(reason, f"{picture.array.shape[-len(shape) :]} for an image of {shape}")
    return picture


def _turned(picture: Picture, before: Affine, whole: NDArray[np.int_]) -> tuple[Picture, Affine]:
    """Axis k of the result is the axis of the picture where column k of `whole` is 1 or -1."""
    dimensions = len(whole)
    first = picture.array.ndim - dimensions
    axes = [int(a) for a in np.abs(whole).argmax(axis=0)]
    signs = [int(whole[a, k]) for k, a in enumerate(axes)]
    array = picture.array.transpose(*range(first), *(first + a for a in axes))
    affine = before.copy()
    for k, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        column = before[:3, axis]
        affine[:3, k] = sign * column
        if sign < 0:
            affine[:3, 3] += column * (picture.array.shape[first + axis] - 1)
            array = np.flip(array, first + k)
    spacing = picture.spacing_mm
    turned = replace(
        picture,
        array=np.ascontiguousarray(array),
        affine=affine,
        spacing_mm=None if spacing is None else tuple(spacing[a] for a in axes),
    )
    return turned, affine


def _distance(one: Affine, other: Affine, shape: tuple[int, ...]) -> float:
    """The largest distance of corresponding corners along an axis of the body, in mm."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(len(shape), -1)
    index = np.zeros((4, corners.shape[1]))
    index[: len(shape)], index[3] = corners, 1
    return float(np.abs(((one - other) @ index)[:3]).max())


def check_upright(affine: Affine, shape: tuple[int, ...]) -> None:
    """Raises CaseError("sheared") where a volume's axes are not at right angles (gantry tilt).

    One voxel of drift over the whole volume is less than what a box of voxels can show.
    """
    steps = affine[:3, :3]
    sizes = np.linalg.norm(steps, axis=0)
    cosines = np.abs((steps / sizes).T @ (steps / sizes))
    np.fill_diagonal(cosines, 0)
    lengths = sizes * (np.array(shape) - 1)
    # Row a, column b: by how many voxels of a the far end of b lies off its right place.
    drift = cosines * lengths[np.newaxis] / sizes[:, np.newaxis]
    if drift.max() > 1:
        tilt = float(np.degrees(np.arcsin(min(1.0, float(cosines.max())))))
        raise CaseError("sheared", f"gantry tilt or shear of {tilt:.1f}°")
