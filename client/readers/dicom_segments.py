"""DICOM SEG on the grid of its image, by place and frame of reference. Runs in the limited child.

PS3.3 A.51 and C.8.20: frames of one segment each, or (label maps) of all segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.readers.dicom_acquisition import whole
from medfl.client.readers.dicom_geometry import on_grid, plane_affine
from medfl.client.readers.dicom_pixels import Answer
from medfl.client.readers.dicom_places import frame_places, place_of
from medfl.client.readers.dicom_values import functional
from medfl.client.readers.structures import Names, class_of
from medfl.common.errors import CaseError

Layers = NDArray[np.uint8]


def segmentation_header(dataset: Any) -> dict[str, Any]:
    """What a DICOM SEG says of the images that it was drawn on."""
    series = [str(s.SeriesInstanceUID) for s in dataset.get("ReferencedSeriesSequence") or ()]
    return {
        "kind": "segmentation",
        "instance": str(dataset.SOPInstanceUID),
        "study": str(dataset.get("StudyInstanceUID", "")),
        "referenced": series,
        "images": [] if series else sorted(_images(dataset)),
        "frame_of_reference": str(dataset.get("FrameOfReferenceUID", "")),
    }


def _images(dataset: Any) -> set[str]:
    """SOP Instance UIDs of the images that a SEG names, wherever it does."""
    found = _instances(dataset.get("SourceImageSequence") or ())
    for series in dataset.get("ReferencedSeriesSequence") or ():
        found |= _instances(series.get("ReferencedInstanceSequence") or ())
    groups = [
        *(dataset.get("SharedFunctionalGroupsSequence") or ()),
        *(dataset.get("PerFrameFunctionalGroupsSequence") or ()),
    ]
    for group in groups:
        found |= _sources(group)
    return found


def _sources(group: Any) -> set[str]:
    derived = group.get("DerivationImageSequence") or ()
    return {u for d in derived for u in _instances(d.get("SourceImageSequence") or ())}


def _instances(items: Iterable[Any]) -> set[str]:
    return {str(i.ReferencedSOPInstanceUID) for i in items if "ReferencedSOPInstanceUID" in i}


def check_frame(drawn: Any, datasets: Sequence[Any]) -> None:
    """Places of two frames of reference cannot be compared (PS3.3 C.7.4.1).

    Raises:
        CaseError: "mask_frame".
    """
    there = str(drawn.get("FrameOfReferenceUID", ""))
    of_image = {str(d.get("FrameOfReferenceUID", "")) for d in datasets} - {""}
    if there and of_image and of_image != {there}:
        raise CaseError("mask_frame")


def mask(segments: Any, datasets: Sequence[Any], request: dict[str, Any]) -> Answer:
    """A DICOM SEG on the grid of its image: (X, Y, Z), or (rows, columns) in 2-D.

    request["names"]: the fields of `Names`.

    Raises:
        CaseError: "mask_geometry", "mask_frame", "mask_overlap", "segment_unknown",
            "segment_ambiguous" or "no_orientation".
    """
    check_frame(segments, datasets)
    layers = _layers(segments, Names(**request["names"]))
    if request["dimensions"] == 2:
        return _flat_mask(layers, segments, datasets[0])
    _, grid = whole(datasets)
    shape = (int(datasets[0].Columns), int(datasets[0].Rows), len(grid.order))
    places = [place_of(segments, i) for i in range(len(layers))]
    array = on_grid(layers, places, grid.affine, shape)
    return {"affine": grid.affine.tolist(), "spacing_mm": grid.spacing_mm}, array


def _layers(segments: Any, names: Names) -> Layers:
    """(frames, rows, columns) of class numbers."""
    pixels = segments.pixel_array
    pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels
    kind = str(segments.SegmentationType)
    described = {int(s.SegmentNumber): s for s in segments.SegmentSequence}
    if kind == "LABELMAP":
        present = [int(n) for n in np.unique(pixels)]
        # 0 is nothing unless it is described.
        classes = _classes({n: described.get(n) for n in present if n or n in described}, names)
        return np.asarray(classes[pixels])
    sequence, keyword = "SegmentIdentificationSequence", "ReferencedSegmentNumber"
    numbers = [int(functional(segments, i, sequence, keyword)) for i in range(len(pixels))]
    top = int(segments.MaximumFractionalValue) if kind == "FRACTIONAL" else 1
    inside = pixels.astype(np.int32) * 2 >= top if kind == "FRACTIONAL" else pixels > 0
    # Only what is drawn must have a class.
    drawn = {n for n, layer in zip(numbers, inside, strict=True) if layer.any()}
    classes = _classes({n: described.get(n) for n in sorted(drawn)}, names)
    return np.asarray(inside.astype(np.uint8) * classes[numbers][:, np.newaxis, np.newaxis])


def _classes(described: dict[int, Any], names: Names) -> Layers:
    """Class number by segment number. Raises CaseError as `class_of`."""
    classes = np.zeros(1 << 16, dtype=np.uint8)
    for number, segment in described.items():
        if segment is None or not 0 <= number < len(classes):
            raise CaseError("mask_values", f"segment {number} is not described")
        if number == 0 and _is_background(segment):
            continue
        label = str(segment.get("SegmentLabel") or "")
        codes = codes_of(segment.get("SegmentedPropertyTypeCodeSequence") or ())
        classes[number] = class_of(label, codes, number, names)
    return classes


def _is_background(segment: Any) -> bool:
    return "background" in str(segment.get("SegmentLabel") or "background").casefold()


def codes_of(items: Iterable[Any]) -> list[str]:
    """Each code as its value and as scheme:value."""
    found: list[str] = []
    for item in items:
        value = str(item.get("CodeValue") or item.get("LongCodeValue") or "").strip()
        scheme = str(item.get("CodingSchemeDesignator") or "").strip()
        found += [value, f"{scheme}:{value}"] if value else []
    return found


def _flat_mask(layers: Layers, segments: Any, dataset: Any) -> Answer:
    shape = (int(dataset.Rows), int(dataset.Columns))
    if layers.shape[1:] != shape:
        raise CaseError("mask_geometry", f"{layers.shape[1:]} for an image of {shape}")
    place = frame_places(dataset)[0]
    plain = {"affine": None, "spacing_mm": place.spacing or None}
    if not (place.position and place.orientation):
        return plain, _merged(layers[_frames_of(segments, dataset, len(layers))])
    step = np.cross(place.orientation[:3], place.orientation[3:])
    same = [_same_plane(segments, i, place) for i in range(len(layers))]
    if not any(same) and (named := _images(segments)) and str(dataset.SOPInstanceUID) not in named:
        raise CaseError("mask_geometry", "the segmentation was drawn on other images")
    places = [place_of(segments, i) for i, here in enumerate(same) if here]
    flat = on_grid(layers[same], places, plane_affine(place, step), (shape[1], shape[0], 1))
    return plain, np.ascontiguousarray(flat[:, :, 0].T)


def _frames_of(segments: Any, dataset: Any, count: int) -> list[int]:
    """The frames that were drawn on an image without a place, by what they name.

    Raises CaseError("mask_geometry") where nothing says of which image a frame is.
    """
    own = str(dataset.SOPInstanceUID)
    if _images(segments) == {own}:
        return list(range(count))
    groups = segments.get("PerFrameFunctionalGroupsSequence") or [{}] * count
    named = [_sources(group) for group in groups]
    if not all(named) or own not in set().union(*named):
        raise CaseError("mask_geometry", "nothing says on which image the segmentation was drawn")
    return [i for i, images in enumerate(named) if own in images]


def _merged(layers: Layers) -> Layers:
    """Layers of one picture as one; a class may be drawn twice, two classes may not meet."""
    merged = np.zeros(layers.shape[1:], dtype=np.uint8)
    for layer in layers:
        if ((merged > 0) & (layer > 0) & (merged != layer)).any():
            raise CaseError("mask_overlap")
        merged = np.maximum(merged, layer)
    return merged


def _same_plane(segments: Any, frame: int, place: Any) -> bool:
    """Within a tenth of a millimetre of the image's plane."""
    there = place_of(segments, frame).position
    if len(there) != 3:
        raise CaseError("mask_geometry", "the segmentation does not say where its frames lie")
    normal = np.cross(place.orientation[:3], place.orientation[3:])
    return abs(float((np.array(there) - np.array(place.position)) @ normal)) < 0.1
