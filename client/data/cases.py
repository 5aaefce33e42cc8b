"""The nouns of a hospital's data: a case as found, a case as read, and the checked cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]
Step = Literal["listing", "matching", "reading"]


@dataclass(frozen=True, slots=True)
class CaseRef:
    """One case as found on disk, before anything heavy is read.

    case_id, patient: as the hospital writes them; they never leave its machine.
    files: image file(s): every slice of a DICOM series, one file else. mask_files: likewise.
    index: position inside a file that holds many cases (MedMNIST, HDF5), else -1.
    fields: the table's columns under the *study's* names (label, split, features, ...), raw text.
    size: spatial shape from the header where that is cheap, else ().
    orientation: of NIfTI voxels whose header gives none, as the site declares it, else "".
    respelled: its line of the table was found only because "1.0" counts as "1".
    two_places: its NIfTI header's qform and sform do not say the same place.
    """

    case_id: str
    patient: str
    files: tuple[Path, ...] = ()
    mask_files: tuple[Path, ...] = ()
    index: int = -1
    fields: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, ...] = ()
    orientation: str = ""
    respelled: bool = False
    two_places: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """An image or a mask with its place in space.

    array: (C, *spatial) for images, (*spatial) for masks; spatial is (H, W) rows and columns in
        2-D, (X, Y, Z) voxel axes of `affine` in 3-D.
    affine: (4, 4) index along the spatial axes (in 2-D: row, column, slice) -> RAS+ millimetres;
        None where the format has none (PNG, projections).
    spacing_mm: along each spatial axis; None where unknown.
    outside: (*spatial), true where the file says that there is no image (padding); those
        pixels hold a dark value and count in no mean, percentile or range. None where nowhere.
    classed: a mask holds the study's class numbers already, so that no map is applied again.
    """

    array: NDArray[np.generic]
    affine: NDArray[np.float64] | None = None
    spacing_mm: tuple[float, ...] | None = None
    outside: NDArray[np.bool_] | None = None
    classed: bool = False


class Arrays(Protocol):
    """Prepared arrays by position, from memory or from the cache; `[i]` copies nothing."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.generic]: ...


@dataclass(frozen=True, slots=True)
class Case:
    """One usable case.

    key: keyed hash of the case id, patient: keyed hash of the patient (hex); safe in local files.
    """

    key: str
    patient: str
    split: Split


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One case left out, with the reason's key in `medfl.client.data.reasons`.

    step: where that was seen: listing the files, matching them with the table, labels and masks,
    or reading their content.
    """

    case_id: str
    reason: str
    detail: str = ""
    step: Step = "listing"


@dataclass(frozen=True, slots=True)
class Found:
    """What a reader lists: the cases, and what cannot even be listed as one."""

    cases: tuple[CaseRef, ...]
    quarantined: tuple[Quarantined, ...] = ()


@dataclass(frozen=True, slots=True)
class Cohort:
    """A site's usable cases of one study, in a stable order (by key).

    inputs: images as prepared by the study's [image] table, float32 (C, *spatial), normalised by
        everything except `federated` statistics; for records an empty sequence.
    targets: classification and risk: int64 class index (N,), multi-label float32 (N, K);
        segmentation: sequence of uint8 masks (*spatial).
    records: raw feature texts a case (only record studies); None = missing value.
    digest: SHA-256 over keys, file contents' fingerprints, labels and preprocessing; what a
        hospital approves.
    """

    cases: tuple[Case, ...]
    inputs: Arrays | Sequence[NDArray[np.generic]]
    targets: Arrays | NDArray[np.generic]
    records: tuple[Mapping[str, str | None], ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    digest: str = ""

    def positions(self, split: Split) -> NDArray[np.int64]:
        """Positions of the cases of one part, ascending."""
        return np.array([i for i, c in enumerate(self.cases) if c.split == split], dtype=np.int64)
