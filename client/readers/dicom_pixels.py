"""From parsed DICOM datasets to arrays with their place. Runs in the limited child.

Everything is read frame by frame: a series of single slices and one enhanced multi-frame file
differ only in where a frame's place and rescaling are written (PS3.3 C.7.6.16).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.readers.dicom_acquisition import whole
from medfl.client.readers.dicom_geometry import Place, plane_affine
from medfl.client.readers.dicom_places import frame_places
from medfl.client.readers.dicom_values import background, frames
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
        "frame_of_reference": str(dataset.get("FrameOfReferenceUID", "")),
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


def _check_alike(datasets: Sequence[Any]) -> None:
    keys = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation")
    if len({tuple(str(d.get(k)) for k in keys) for d in datasets}) > 1:
        raise CaseError("mixed_geometry", "slices differ in size or colour")


def volume(datasets: Sequence[Any]) -> Answer:
    """A series or one multi-frame file as (C, X, Y, Z): columns, rows, slices; padding is NaN.

    Raises CaseError.
    """
    _check_alike(datasets)
    datasets, grid = whole(datasets)
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
    place = frame_places(datasets[0])[0]
    plain = {
        "affine": _flat_affine(place),
        "spacing_mm": place.spacing or None,
        "background": background(datasets[0]),
    }
    return plain, np.ascontiguousarray(array.transpose(2, 0, 1))


def _flat_affine(place: Place) -> list[list[float]] | None:
    """(row, column, slice) index -> RAS mm; None where the file does not say (projections)."""
    if not (len(place.position) == 3 and len(place.orientation) == 6 and len(place.spacing) == 2):
        return None
    normal = np.cross(place.orientation[:3], place.orientation[3:])
    affine: list[list[float]] = plane_affine(place, normal)[:, [1, 0, 2, 3]].tolist()
    return affine


def content(dataset: Any) -> str:
    """SHA-256 of what an image shows, of whom and where: the same however it is stored."""
    values = frames(dataset)
    names = (
        "PatientID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Modality",
        "FrameOfReferenceUID",
    )
    said = [str(dataset.get(name, "")) for name in names]
    said += [str(place) for place in frame_places(dataset)] + [str(values.shape)]
    return hashlib.sha256("\0".join(said).encode() + values.tobytes()).hexdigest()
