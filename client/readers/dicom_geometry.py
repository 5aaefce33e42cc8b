"""Where DICOM slices lie: order, evenness and the affine to RAS, from PS3.3 C.7.6.2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import CaseError

Vector = NDArray[np.float64]

# DICOM counts towards the patient's left and back (LPS), nibabel and medfl towards right and front.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, slots=True)
class Place:
    """One slice's place. position: ImagePositionPatient, mm. orientation: six direction cosines,
    along a row, then down a column. spacing: (between rows, between columns), mm."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """Evenly spaced slices. order: positions in the caller's list, along the normal.

    affine: (column, row, slice) index -> RAS mm. spacing_mm: along those three axes.
    """

    order: tuple[int, ...]
    affine: Vector
    spacing_mm: tuple[float, float, float]


def along_normal(place: Place) -> float:
    """Distance of the slice from the origin along the normal of its plane, in mm."""
    row, column = np.array(place.orientation[:3]), np.array(place.orientation[3:])
    return float(np.dot(np.cross(row, column), place.position))


def stack(places: Sequence[Place]) -> Stack:
    """Order slices and find their common grid.

    Raises:
        CaseError: "no_orientation", "mixed_geometry", "several_volumes", "slice_gap".
    """
    _check_alike(places)
    order = sorted(range(len(places)), key=lambda i: along_normal(places[i]))
    heights = np.array([along_normal(places[i]) for i in order])
    if len(order) < 2:
        raise CaseError("dimensions", "one slice instead of a volume")
    steps = np.diff(heights)
    if steps.min() < 1e-3:
        raise CaseError("several_volumes", f"{int((steps < 1e-3).sum())} places occur again")
    # A tenth of a step: rounding in the headers is far below, a lost slice is a whole step.
    if np.ptp(steps) > 0.1 * float(np.median(steps)):
        raise CaseError("slice_gap", f"steps from {steps.min():.2f} to {steps.max():.2f} mm")
    first, last = (np.array(places[i].position) for i in (order[0], order[-1]))
    step = (last - first) / (len(order) - 1)
    affine = plane_affine(places[order[0]], step)
    rows, columns = places[0].spacing
    return Stack(tuple(order), affine, (columns, rows, float(steps.mean())))


def plane_affine(place: Place, step: Vector) -> Vector:
    """(column, row, slice) index -> RAS mm, PS3.3 equation C.7.6.2.1-1 with slices `step` apart."""
    affine = np.eye(4)
    affine[:3, 0] = np.array(place.orientation[:3]) * place.spacing[1]
    affine[:3, 1] = np.array(place.orientation[3:]) * place.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = place.position
    return _LPS_TO_RAS @ affine


def _check_alike(places: Sequence[Place]) -> None:
    for place in places:
        complete = len(place.position) == 3 and len(place.orientation) == 6
        if not complete or len(place.spacing) != 2:
            raise CaseError("no_orientation")
        axes = np.array(place.orientation).reshape(2, 3)
        if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2) or min(place.spacing) <= 0:
            raise CaseError("no_orientation", "the directions are not at right angles")
    cosines = np.array([p.orientation for p in places])
    spacings = np.array([p.spacing for p in places])
    if np.ptp(cosines, axis=0).max() > 1e-3 or np.ptp(spacings, axis=0).max() > 1e-3:
        raise CaseError("mixed_geometry", "slices differ in direction or spacing")


def on_grid(
    layers: NDArray[np.uint8], places: Sequence[Place], affine: Vector, shape: Sequence[int]
) -> NDArray[np.uint8]:
    """Put single layers (n, rows, columns) on a volume's grid (columns, rows, slices), by place.

    Layers may be stored the other way round (flipped, or down instead of up); they must meet the
    grid's voxels, for nothing is interpolated. Layers of two classes must not overlap.

    Raises:
        CaseError: "mask_geometry" or "mask_overlap".
    """
    volume = np.zeros(tuple(shape), dtype=np.uint8)
    to_index = np.linalg.inv(affine)
    met = not len(layers)
    for layer, place in zip(layers, places, strict=True):
        if not (len(place.position) == 3 and len(place.orientation) == 6 and place.spacing):
            raise CaseError("mask_geometry", "the segmentation does not say where it lies")
        step = np.cross(place.orientation[:3], place.orientation[3:])
        turn = (to_index @ plane_affine(place, step))[:, [0, 1, 3]]
        index = _whole(turn, layer.shape)
        rows, columns = np.nonzero(layer)
        at = index @ np.stack([columns, rows, np.ones_like(rows)])
        if at.size and (at.min() < 0 or (at.max(axis=1) >= np.array(shape)).any()):
            raise CaseError("mask_geometry", "the segmentation lies outside the image")
        met = met or _meets(index, layer.shape, shape)
        before, drawn = volume[at[0], at[1], at[2]], layer[rows, columns]
        if ((before > 0) & (before != drawn)).any():
            raise CaseError("mask_overlap")
        volume[at[0], at[1], at[2]] = drawn
    if not met:
        # Not even its empty layers say anything about this image.
        raise CaseError("mask_geometry", "the segmentation covers another place than the image")
    return volume


def _meets(index: NDArray[np.int64], layer: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a layer and a volume have a voxel in common."""
    ends = index @ np.array([[0, layer[1] - 1], [0, layer[0] - 1], [1, 1]])
    return bool((ends.max(axis=1) >= 0).all() and (ends.min(axis=1) < np.array(shape)).all())


def _whole(turn: Vector, shape: Sequence[int]) -> NDArray[np.int64]:
    """(3, 3) layer index -> grid index in whole numbers; within a tenth of a voxel everywhere."""
    index = np.rint(turn[:3]).astype(np.int64)
    far = np.array([[0, shape[1], 0, shape[1]], [0, 0, shape[0], shape[0]], [1, 1, 1, 1]])
    if np.abs((turn[:3] - index) @ far).max() > 0.1:
        raise CaseError("mask_geometry", "the segmentation has another grid than the image")
    return index
