"""Which masks belong to which DICOM series: by what a SEG or RT Structure Set names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medfl.client.data.cases import Quarantined
from medfl.client.readers.dicom_item import Item

DRAWN = ("segmentation", "contours")


@dataclass(frozen=True, slots=True)
class Masks:
    """Files with masks by the series that they were drawn on, and those of no series here."""

    by_series: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    alone: Sequence[Quarantined] = ()


def masks_of(drawn: Sequence[Item], images_found: Sequence[Item]) -> Masks:
    """SEG and RT Structure Sets by series; a series with a SEG does without contours."""
    there = {i.header["series"] for i in images_found}
    found: dict[str, dict[str, list[Path]]] = {kind: defaultdict(list) for kind in DRAWN}
    alone: list[Quarantined] = []
    for item in drawn:
        named = item.header["referenced"] or _series_of(item, images_found)
        for series in dict.fromkeys(named):
            found[item.header["kind"]][series].append(item.path)
        if not there & set(named):
            alone.append(Quarantined(item.header["instance"], "mask_alone", item.path.name))
    return Masks({**found["contours"], **found["segmentation"]}, alone)


def _series_of(segmentation: Item, images_found: Sequence[Item]) -> list[str]:
    """The series of a SEG that names none: of the images that it names, else the one series of
    its study in its frame of reference. Where there are several, nothing says which is meant."""
    header = segmentation.header
    if header["images"]:
        named = set(header["images"])
        return sorted({i.header["series"] for i in images_found if i.header["instance"] in named})
    place = (header["study"], header["frame_of_reference"])
    found = {
        i.header["series"]
        for i in images_found
        if all(place) and (i.header["study"], i.header["frame_of_reference"]) == place
    }
    return sorted(found) if len(found) == 1 else []
