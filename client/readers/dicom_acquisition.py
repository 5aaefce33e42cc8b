"""Whether a series is one acquisition, and its slices without copies. Runs in the limited child."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medfl.client.readers.dicom_geometry import Place, Stack, along_normal, stack
from medfl.client.readers.dicom_places import frame_places
from medfl.client.readers.dicom_values import frames, functional
from medfl.common.errors import CaseError

# What is one value within an acquisition: along the normal, none comes back after another.
_ONE = (
    ("AcquisitionUID", ""),
    ("IrradiationEventUID", ""),
    ("ConvolutionKernel", ""),
    ("KVP", ""),
    ("EchoTime", ""),
    ("EchoNumbers", ""),
    ("InversionTime", ""),
    ("StackID", "FrameContentSequence"),
    ("TemporalPositionIndex", "FrameContentSequence"),
    ("TemporalPositionIdentifier", ""),
    ("EffectiveEchoTime", "MREchoSequence"),
    ("DiffusionBValue", "MRDiffusionSequence"),
)


def places_of(datasets: Sequence[Any]) -> list[Place]:
    """The place of every frame of every file. Raises CaseError("no_orientation")."""
    places = [place for dataset in datasets for place in frame_places(dataset)]
    if len(places) != sum(int(d.get("NumberOfFrames") or 1) for d in datasets):
        raise CaseError("no_orientation", "the file does not say where its frames lie")
    return places


def whole(datasets: Sequence[Any]) -> tuple[list[Any], Stack]:
    """The files of one volume, copies of a slice passed over, and their grid.

    Raises:
        CaseError: "several_acquisitions", "mixed_geometry", or as `stack`.
    """
    kept = _without_copies(list(datasets))
    places = places_of(kept)
    frames_of_reference = {str(d.get("FrameOfReferenceUID", "")) for d in kept} - {""}
    if len(frames_of_reference) > 1:
        raise CaseError("mixed_geometry", "slices of several frames of reference")
    _check_one_acquisition(kept, places)
    return kept, stack(places)


def _without_copies(datasets: list[Any]) -> list[Any]:
    """Single slices that were exported twice (same place, same pixels) count once."""
    if any(int(d.get("NumberOfFrames") or 1) > 1 for d in datasets):
        return datasets
    kept: dict[str, list[Any]] = {}
    for dataset in datasets:
        place = places_of([dataset])[0]
        # A thousandth of a millimetre: below, two places are one.
        at = str([round(v, 3) for v in (*place.position, *place.orientation)])
        same = kept.setdefault(at, [])
        if not any(_alike(dataset, other) for other in same):
            same.append(dataset)
    return [dataset for same in kept.values() for dataset in same]


def _alike(one: Any, other: Any) -> bool:
    first, second = frames(one), frames(other)
    return first.shape == second.shape and np.array_equal(first, second, equal_nan=True)


def _check_one_acquisition(datasets: Sequence[Any], places: Sequence[Place]) -> None:
    """Slices of two acquisitions that lie between each other are no volume.

    A step-and-shoot series has a number or time for each step: they only rise, or only fall,
    along the body. Two scans of one place have them in turns.
    """
    if any(len(p.position) != 3 or len(p.orientation) != 6 for p in places):
        return
    heights = np.array([along_normal(p) for p in places])
    order = np.argsort(heights, kind="stable")
    if len(order) < 2 or np.diff(heights[order]).min() < 1e-3:
        return
    where = [(d, k) for d in datasets for k in range(int(d.get("NumberOfFrames") or 1))]
    ordered = [where[int(i)] for i in order]
    for keyword, sequence in _ONE:
        values = [str(functional(d, k, sequence, keyword) or "") for d, k in ordered]
        if _in_turns(values):
            raise CaseError("several_acquisitions", f"{keyword} changes to and fro")
    numbers = [_number(d, k) for d, k in ordered]
    if any(numbers):
        if not _one_way(numbers):
            raise CaseError("several_acquisitions", "the numbers of acquisition change to and fro")
    elif str(ordered[0][0].get("Modality")) == "CT":
        # Slices of MR are often excited in turns; those of CT never are.
        times = [
            str(d.get("AcquisitionDateTime") or d.get("AcquisitionTime") or "") for d, _ in ordered
        ]
        if not _one_way(times):
            raise CaseError("several_acquisitions", "the times of acquisition change to and fro")


def _number(dataset: Any, frame: int) -> str:
    value = functional(dataset, frame, "FrameContentSequence", "FrameAcquisitionNumber")
    return str(dataset.get("AcquisitionNumber") if value is None else value or "").replace(
        "None", ""
    )


def _in_turns(values: Sequence[str]) -> bool:
    """Whether a value comes back after another."""
    runs = [v for i, v in enumerate(values) if i == 0 or v != values[i - 1]]
    return len(set(runs)) < len(runs)


def _one_way(values: Sequence[str]) -> bool:
    """Whether values never fall or never rise; where one is no number, whether none comes back."""
    try:
        steps = np.diff([float(v) for v in values])
    except ValueError:
        return not _in_turns(values)
    return bool((steps >= 0).all() or (steps <= 0).all())
