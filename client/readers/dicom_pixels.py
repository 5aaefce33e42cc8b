"""From parsed DICOM datasets to arrays with their place. Runs in the limited child.

Everything is read frame by frame: a series of single slices and one enhanced multi-frame file
differ only in where a frame's place and rescaling are written (PS3.3 C.7.6.16).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.readers.dicom_geometry import Place, on_grid, plane_affine, stack
from medfl.client.readers.dicom_values import background, frames, functional
from medfl.common.errors import CaseError

Array = NDArray[np.generic]
Answer = tuple[dict[str, Any], Any]

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def image_header(dataset: Any, kind: str) -> dict[str, Any]:
    """What grouping needs of one image file. Raises CaseError for what no study may use."""
    modality = str(dataset.get("Modality", ""))
    check_burned_in(dataset, modality, kind)
    frames = int(dataset.get("NumberOfFrames") or 1)
    place = frame_places(dataset)[0]
    return {
        "kind": "image",
        "patient": str(dataset.get("PatientID", "")).strip(),
        "study": str(dataset.get("StudyInstanceUID", "")),
        "series": str(dataset.get("SeriesInstanceUID", "")),
        "instance": str(dataset.SOPInstanceUID),
        "accession": str(dataset.get("AccessionNumber", "")),
        "frames": frames,
        "mosaic": "MOSAIC" in (dataset.get("ImageType") or ()),
        "size": [int(dataset.Columns), int(dataset.Rows)],
        "position": list(place.position),
        "orientation": list(place.orientation),
    }


def check_burned_in(dataset: Any, modality: str, kind: str) -> None:
    """Raises CaseError("burned_in" or "burned_in_unknown") where text may be in the picture."""
    burned = str(dataset.get("BurnedInAnnotation", "")).upper()
    if burned == "YES":
        raise CaseError("burned_in")
    risky = modality in ("US", "XA", "SC") or kind.startswith(_SECONDARY_CAPTURE)
    if risky and burned != "NO":
        raise CaseError("burned_in_unknown", modality)


def segmentation_header(dataset: Any) -> dict[str, Any]:
    """Which series a DICOM SEG speaks of."""
    series = [str(s.SeriesInstanceUID) for s in dataset.get("ReferencedSeriesSequence", ())]
    return {
        "kind": "segmentation",
        "instance": str(dataset.SOPInstanceUID),
        "referenced": series,
    }


def frame_places(dataset: Any) -> list[Place]:
    """The place of every frame; empty tuples where the file does not say."""
    enhanced = "PerFrameFunctionalGroupsSequence" in dataset
    count = len(dataset.PerFrameFunctionalGroupsSequence) if enhanced else 1
    return [_place(dataset, frame) for frame in range(count)]


def _place(dataset: Any, frame: int) -> Place:
    def numbers(sequence: str, keyword: str) -> tuple[float, ...]:
        return tuple(float(v) for v in functional(dataset, frame, sequence, keyword) or ())

    spacing = numbers("PixelMeasuresSequence", "PixelSpacing")
    return Place(
        numbers("PlanePositionSequence", "ImagePositionPatient"),
        numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
        spacing or tuple(float(v) for v in dataset.get("ImagerPixelSpacing") or ()),
    )


def _check_alike(datasets: Sequence[Any]) -> None:
    keys = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation")
    if len({tuple(str(d.get(k)) for k in keys) for d in datasets}) > 1:
        raise CaseError("mixed_geometry", "slices differ in size or colour")


def volume(datasets: Sequence[Any]) -> Answer:
    """A series or one multi-frame file as (C, X, Y, Z): columns, rows, slices; padding is NaN.

    Raises CaseError.
    """
    _check_alike(datasets)
    places = [place for dataset in datasets for place in frame_places(dataset)]
    count = sum(int(d.get("NumberOfFrames") or 1) for d in datasets)
    if len(places) != count:
        raise CaseError("no_orientation", "the file does not say where its frames lie")
    grid = stack(places)
    values = np.concatenate([frames(d) for d in datasets])[list(grid.order)]
    colours = values[..., np.newaxis] if values.ndim == 3 else values
    array = np.ascontiguousarray(colours.transpose(3, 2, 1, 0))
    return {
        "affine": grid.affine.tolist(),
        "spacing_mm": grid.spacing_mm,
        "background": background(datasets[0]),
    }, array


def plane(datasets: Sequence[Any]) -> Answer:
    """One single-frame image as (C, rows, columns); padding is NaN. Raises CaseError."""
    values = frames(datasets[0])
    if len(values) != 1:
        raise CaseError("dimensions", f"{len(values)} frames instead of one")
    array = values[0] if values.ndim == 4 else values[0][..., np.newaxis]
    spacing = frame_places(datasets[0])[0].spacing
    plain = {
        "affine": None,
        "spacing_mm": spacing or None,
        "background": background(datasets[0]),
    }
    return plain, np.ascontiguousarray(array.transpose(2, 0, 1))


def mask(segments: Any, datasets: Sequence[Any], request: dict[str, Any]) -> Answer:
    """A DICOM SEG on the grid of its image: (X, Y, Z), or (rows, columns) in 2-D.

    request["labels"]: segment label -> class number; segments of other names keep their number.

    Raises:
        CaseError: "mask_geometry", "mask_overlap" or "no_orientation".
    """
    layers = _layers(segments, request["labels"])
    if request["dimensions"] == 2:
        return _flat_mask(layers, segments, datasets[0])
    image_places = [place for dataset in datasets for place in frame_places(dataset)]
    grid = stack(image_places)
    shape = (int(datasets[0].Columns), int(datasets[0].Rows), len(image_places))
    places = [_place(segments, i) for i in range(len(layers))]
    array = on_grid(layers, places, grid.affine, shape)
    return {"affine": grid.affine.tolist(), "spacing_mm": grid.spacing_mm}, array


def _layers(segments: Any, labels: dict[str, int]) -> NDArray[np.uint8]:
    """(frames, rows, columns) of class numbers (PS3.3 C.8.20)."""
    pixels = segments.pixel_array
    pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels
    classes = np.arange(256, dtype=np.uint8)
    for segment in segments.SegmentSequence:
        number, label = int(segment.SegmentNumber), str(segment.get("SegmentLabel", ""))
        if not 0 < number < 256:
            raise CaseError("mask_values", f"segment number {number}")
        classes[number] = labels.get(label, number)
    kind = str(segments.SegmentationType)
    if kind == "LABELMAP":
        return np.asarray(classes[pixels.astype(np.uint8)])
    top = int(segments.MaximumFractionalValue) if kind == "FRACTIONAL" else 1
    inside = pixels.astype(np.int32) * 2 >= top if kind == "FRACTIONAL" else pixels > 0
    sequence, keyword = "SegmentIdentificationSequence", "ReferencedSegmentNumber"
    numbers = [int(functional(segments, i, sequence, keyword)) for i in range(len(pixels))]
    return np.asarray(inside.astype(np.uint8) * classes[numbers][:, np.newaxis, np.newaxis])


def _flat_mask(layers: NDArray[np.uint8], segments: Any, dataset: Any) -> Answer:
    shape = (int(dataset.Rows), int(dataset.Columns))
    if layers.shape[1:] != shape:
        raise CaseError("mask_geometry", f"{layers.shape[1:]} for an image of {shape}")
    place = frame_places(dataset)[0]
    chosen = layers
    if place.position and place.orientation:
        step = np.cross(place.orientation[:3], place.orientation[3:])
        affine = plane_affine(place, step)
        same = [_same_plane(segments, i, place) for i in range(len(layers))]
        volume_mask = on_grid(
            layers[same],
            [_place(segments, i) for i, here in enumerate(same) if here],
            affine,
            (shape[1], shape[0], 1),
        )
        return {"affine": None, "spacing_mm": place.spacing or None}, np.ascontiguousarray(
            volume_mask[:, :, 0].T
        )
    if ((chosen > 0).sum(axis=0) > 1).any():
        raise CaseError("mask_overlap")
    return {"affine": None, "spacing_mm": place.spacing or None}, chosen.max(axis=0)


def _same_plane(segments: Any, frame: int, place: Place) -> bool:
    """Within a tenth of a millimetre of the image's plane."""
    position = np.array(_place(segments, frame).position) - np.array(place.position)
    normal = np.cross(place.orientation[:3], place.orientation[3:])
    return abs(float(position @ normal)) < 0.1
