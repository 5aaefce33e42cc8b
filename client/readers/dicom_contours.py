"""RT Structure Sets: closed contours to voxels on the grid of their image. In the limited child.

PS3.3 C.8.8.5 and C.8.8.6: points in mm of the patient, one list a contour, each in one slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.readers.dicom_acquisition import whole
from medfl.client.readers.dicom_geometry import plane_affine
from medfl.client.readers.dicom_pixels import Answer
from medfl.client.readers.dicom_places import frame_places
from medfl.client.readers.dicom_segments import codes_of
from medfl.client.readers.structures import Names, class_of
from medfl.common.errors import CaseError

Vector = NDArray[np.float64]
Layer = NDArray[np.bool_]

_XOR = "CLOSEDPLANAR_XOR"
# Of one slice's distance: contours are written with two decimals or so.
_OFF_PLANE = 0.2
# Drawn for planning and not for what is in the patient; counts only where a map names it.
_NO_ORGANS = ("EXTERNAL", "SUPPORT", "FIXATION", "ISOCENTER", "MARKER", "DOSE_REGION", "BOLUS")


def contours_header(dataset: Any) -> dict[str, Any]:
    """What an RT Structure Set says of the images that it was drawn on."""
    frames = dataset.get("ReferencedFrameOfReferenceSequence") or ()
    studies = [s for f in frames for s in f.get("RTReferencedStudySequence") or ()]
    series = [s for r in studies for s in r.get("RTReferencedSeriesSequence") or ()]
    named = {str(f.get("FrameOfReferenceUID", "")) for f in frames}
    named |= {
        str(r.get("ReferencedFrameOfReferenceUID", ""))
        for r in dataset.get("StructureSetROISequence") or ()
    }
    named.discard("")
    return {
        "kind": "contours",
        "instance": str(dataset.SOPInstanceUID),
        "study": str(dataset.get("StudyInstanceUID", "")),
        "referenced": [str(s.SeriesInstanceUID) for s in series if "SeriesInstanceUID" in s],
        "images": sorted(_images(dataset)),
        "frame_of_reference": named.pop() if len(named) == 1 else "",
    }


def _images(dataset: Any) -> set[str]:
    return {
        str(image.ReferencedSOPInstanceUID)
        for region in dataset.get("ROIContourSequence") or ()
        for contour in region.get("ContourSequence") or ()
        for image in contour.get("ContourImageSequence") or ()
        if "ReferencedSOPInstanceUID" in image
    }


def mask(drawn: Any, datasets: Sequence[Any], request: dict[str, Any]) -> Answer:
    """An RT Structure Set on the grid of its image: (X, Y, Z), or (rows, columns) in 2-D.

    A voxel belongs to a structure where its centre lies inside; a contour within another of the
    same structure is a hole. request["names"]: the fields of `Names`.

    Raises:
        CaseError: "contours", "mask_frame", "mask_geometry", "mask_overlap", "segment_unknown",
            "segment_ambiguous", or as the image.
    """
    flat = request["dimensions"] == 2
    affine, depth, plain = _flat_grid(datasets[0]) if flat else _grid(datasets)
    shape = (int(datasets[0].Columns), int(datasets[0].Rows), depth)
    frames = {str(d.get("FrameOfReferenceUID", "")) for d in datasets} - {""}
    classes = _classes(drawn, Names(**request["names"]), frames)
    volume = np.zeros(shape, dtype=np.uint8)
    to_index: Vector = np.linalg.inv(affine).astype(np.float64)
    for region in drawn.get("ROIContourSequence") or ():
        number = classes.get(int(region.ReferencedROINumber), 0)
        if not number:
            continue
        for slice_, layer in _layers(region, to_index, shape, flat=flat).items():
            before = volume[:, :, slice_]
            if ((before > 0) & (before != number) & layer.T).any():
                raise CaseError("mask_overlap")
            before[layer.T] = number
    return plain, np.ascontiguousarray(volume[:, :, 0].T) if flat else volume


def _grid(datasets: Sequence[Any]) -> tuple[Vector, int, dict[str, Any]]:
    _, grid = whole(datasets)
    plain = {"affine": grid.affine.tolist(), "spacing_mm": grid.spacing_mm}
    return grid.affine, len(grid.order), plain


def _flat_grid(dataset: Any) -> tuple[Vector, int, dict[str, Any]]:
    place = frame_places(dataset)[0]
    if not (len(place.position) == 3 and len(place.orientation) == 6 and len(place.spacing) == 2):
        raise CaseError("mask_geometry", "the image does not say where it lies, contours do")
    normal = np.cross(place.orientation[:3], place.orientation[3:])
    return plane_affine(place, normal), 1, {"affine": None, "spacing_mm": place.spacing}


def _classes(drawn: Any, names: Names, frames: set[str]) -> dict[int, int]:
    """Class by number of the region; only regions that are drawn must have one."""
    regions = {int(r.ROINumber): r for r in drawn.get("StructureSetROISequence") or ()}
    observed = {
        int(o.ReferencedROINumber): o
        for o in drawn.get("RTROIObservationsSequence") or ()
        if "ReferencedROINumber" in o
    }
    found: dict[int, int] = {}
    for region in drawn.get("ROIContourSequence") or ():
        number = int(region.ReferencedROINumber)
        if not region.get("ContourSequence"):
            continue
        if number not in regions:
            raise CaseError("contours", f"region {number} is not described")
        seen = observed.get(number, {})
        label = str(regions[number].get("ROIName") or "")
        codes = codes_of(seen.get("RTROIIdentificationCodeSequence") or ())
        try:
            found[number] = class_of(label, codes, 0, names)
        except CaseError as error:
            kind = str(seen.get("RTROIInterpretedType") or "").upper()
            if error.reason != "segment_unknown" or kind not in _NO_ORGANS:
                raise
            continue
        frame = str(regions[number].get("ReferencedFrameOfReferenceUID") or "")
        if found[number] and frame and frames and frames != {frame}:
            raise CaseError("mask_frame")
    return found


def _layers(
    region: Any, to_index: Vector, shape: tuple[int, int, int], *, flat: bool
) -> dict[int, Layer]:
    """Slice -> (rows, columns), true inside one structure."""
    polygons: dict[int, list[tuple[Vector, bool]]] = defaultdict(list)
    for contour in region.ContourSequence:
        kind = str(contour.get("ContourGeometricType") or "")
        points = _points(contour, kind, to_index)
        slice_ = int(np.rint(points[:, 2].mean()))
        near = float(np.abs(points[:, 2] - slice_).max()) <= _OFF_PLANE
        if flat and (not near or slice_ != 0):
            continue  # of another slice of the series
        if not near:
            raise CaseError("contours", "a contour lies between or across slices")
        if not 0 <= slice_ < shape[2] or not _within(points, shape):
            raise CaseError("mask_geometry", "the contours lie outside the image")
        polygons[slice_].append((points[:, :2], kind == _XOR))
    steps = set(np.diff(sorted(polygons)).tolist())
    if len(steps) == 1 and len(polygons) > 2 and (step := steps.pop()) > 1:
        raise CaseError("contours", f"they are drawn on every {step}th slice only")
    return {k: _combined(several, shape) for k, several in polygons.items()}


def _points(contour: Any, kind: str, to_index: Vector) -> Vector:
    """(n, 3) column, row and slice of a closed contour's points."""
    if kind not in ("CLOSED_PLANAR", _XOR):
        raise CaseError("contours", f"a contour is of the kind {kind or 'unknown'}")
    flat = np.array([float(v) for v in contour.ContourData], dtype=np.float64)
    if flat.size < 9 or flat.size % 3 or not np.isfinite(flat).all():
        raise CaseError("contours", f"a contour has {flat.size} numbers")
    # From DICOM's directions (left, back) to those of the affine (right, front).
    body = flat.reshape(-1, 3) * [-1.0, -1.0, 1.0]
    return np.asarray(body @ to_index[:3, :3].T + to_index[:3, 3])


def _within(points: Vector, shape: Sequence[int]) -> bool:
    """Inside the picture, whose voxels reach half a voxel beyond their centres (and rounding)."""
    ends = np.array(shape[:2])
    return bool((points[:, :2] >= -0.6).all() and (points[:, :2] <= ends - 0.4).all())


def _combined(polygons: Sequence[tuple[Vector, bool]], shape: Sequence[int]) -> Layer:
    """The polygons of one structure in one slice, larger first, so that holes follow."""
    inside = np.zeros((shape[1], shape[0]), dtype=np.bool_)
    drawn: list[Layer] = []
    for points, xor in sorted(polygons, key=lambda p: -_area(p[0])):
        layer = filled_polygon(points, inside.shape)
        shared = layer & inside
        if xor or not shared.any():
            inside ^= layer
        elif any((layer == other).all() for other in drawn):
            continue  # the same contour twice
        elif (shared == layer).all():
            inside &= ~layer
        else:
            raise CaseError("contours", "two contours of one structure cross each other")
        drawn.append(layer)
    return inside


def _area(points: Vector) -> float:
    x, y = points[:, 0], points[:, 1]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def filled_polygon(points: Vector, shape: Sequence[int]) -> Layer:
    """(rows, columns), true where a voxel's centre lies inside; of the edge, left and upper.

    points: (n, 2) column and row, voxel centres at whole numbers. A polygon that touches itself
    (a hole on a channel) counts by the even-odd rule.
    """
    inside = np.zeros(tuple(shape), dtype=np.bool_)
    x, y = points[:, 0], points[:, 1]
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    columns = np.arange(shape[1])
    first, last = max(0, int(np.floor(y.min()))), min(shape[0] - 1, int(np.ceil(y.max())))
    for row in range(first, last + 1):
        crossing = (y <= row) != (y2 <= row)
        rise = y2[crossing] - y[crossing]
        at = x[crossing] + (row - y[crossing]) / rise * (x2[crossing] - x[crossing])
        right_of = len(at) - np.searchsorted(np.sort(at), columns, side="right")
        inside[row] = right_of % 2 == 1
    return inside
