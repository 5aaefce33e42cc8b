"""Where the frames of a DICOM file say that they lie. Runs in the limited child."""

from __future__ import annotations

from typing import Any

from medfl.client.readers.dicom_geometry import Place
from medfl.client.readers.dicom_values import functional


def frame_places(dataset: Any) -> list[Place]:
    """The place of every frame; empty tuples where the file does not say."""
    enhanced = "PerFrameFunctionalGroupsSequence" in dataset
    count = len(dataset.PerFrameFunctionalGroupsSequence) if enhanced else 1
    return [place_of(dataset, frame) for frame in range(count)]


def place_of(dataset: Any, frame: int) -> Place:
    """The place of one frame; empty tuples where the file does not say."""

    def numbers(sequence: str, keyword: str) -> tuple[float, ...]:
        return tuple(float(v) for v in functional(dataset, frame, sequence, keyword) or ())

    spacing = numbers("PixelMeasuresSequence", "PixelSpacing")
    return Place(
        numbers("PlanePositionSequence", "ImagePositionPatient"),
        numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
        spacing or tuple(float(v) for v in dataset.get("ImagerPixelSpacing") or ()),
    )
