"""Cases whose label, record and split are sound, before any picture is read."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import CaseRef, Found, Quarantined, Split
from medfl.client.data.fingerprints import Fingerprints
from medfl.client.data.labels import beyond_range, class_target, record_of
from medfl.client.data.splits import split_name
from medfl.client.readers.rows import MASK_SUFFIXES
from medfl.common.errors import CaseError, MedflError
from medfl.common.source import DataSource
from medfl.common.study import Study

log = logging.getLogger(__name__)

Target = int | NDArray[np.float32] | None
Record = Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A case whose label or record is sound, before its picture is read.

    content: fingerprint of picture, mask or record. position: place in the reader's list.
    """

    ref: CaseRef
    key: str
    content: str
    position: int
    target: Target
    record: Record | None
    given: Split | None


def choose(
    found: Found, source: DataSource, study: Study, prints: Fingerprints, site_key: bytes
) -> tuple[list[Candidate], list[Quarantined]]:
    """Cases with a sound label, record and split; copies of one picture are left out."""
    candidates: list[Candidate] = []
    faulty: list[Quarantined] = []
    pictures: set[str] = set()
    for position, ref in enumerate(found.cases):
        try:
            candidate = _candidate(ref, position, source, study, site_key)
            if study.image is not None:
                picture, content = prints.of_case(ref)
                if picture in pictures:
                    raise CaseError("duplicate")
                pictures.add(picture)
                candidate = replace(candidate, content=content)
            candidates.append(candidate)
        except Exception as exception:  # noqa: BLE001  one bad file costs its case
            error = case_error(exception)
            faulty.append(Quarantined(ref.case_id, error.reason, error.detail))
    if study.task.kind == "segmentation":
        return _with_own_masks(candidates, faulty, study)
    return candidates, faulty


def case_error(error: Exception) -> CaseError:
    """Why a case is left out that could not be read: one bad file costs its case.

    What a reader did not foresee is a reason too. Errors that are not about one case (settings,
    storage) are raised again.
    """
    if isinstance(error, CaseError):
        return error
    if isinstance(error, MedflError):
        raise error
    if isinstance(error, MemoryError):
        return CaseError("memory")
    if isinstance(error, OSError):
        return CaseError("unreadable", error.strerror or "")
    log.warning("A case could not be read.", exc_info=error)
    return CaseError("reading_failed", type(error).__name__)


def _with_own_masks(
    candidates: Sequence[Candidate], faulty: Sequence[Quarantined], study: Study
) -> tuple[list[Candidate], list[Quarantined]]:
    """One mask never serves two images: where nothing says whose it is, it is none's.

    A DICOM segmentation names the images that its frames belong to, and may serve the slices of
    its series in a study of slices.
    """
    of_slices = study.image is not None and study.image.dimensions == 2
    masks: Counter[str] = Counter()
    for c in candidates:
        masks.update({os.path.realpath(f) for f in c.ref.mask_files if c.ref.index < 0})
    kept: list[Candidate] = []
    shared: list[Quarantined] = []
    for c in candidates:
        files = [f for f in c.ref.mask_files if masks[os.path.realpath(f)] > 1]
        if any(f.name.lower().endswith(MASK_SUFFIXES) or not of_slices for f in files):
            detail = f"{files[0].name} would serve {masks[os.path.realpath(files[0])]} images"
            shared.append(Quarantined(c.ref.case_id, "mask_shared", detail))
        else:
            kept.append(c)
    return kept, [*faulty, *shared]


def _candidate(
    ref: CaseRef, position: int, source: DataSource, study: Study, site_key: bytes
) -> Candidate:
    segmentation = study.task.kind == "segmentation"
    if segmentation and not ref.mask_files:
        raise CaseError("mask_missing")
    record: Record | None = None
    content = ""
    if study.record is not None:
        record = record_of(ref, source, study.record.features)
        if study.record.missing == "drop" and None in record.values():
            beyond = beyond_range(ref, source, study.record.features)
            raise CaseError("implausible" if beyond else "incomplete_record", "; ".join(beyond))
        content = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    target = None if segmentation else class_target(ref, source, study)
    given = None
    if study.evaluation.split == "given" and ref.fields.get("split"):
        given = split_name(ref.fields["split"])
    key = hashed(site_key, "case", ref.case_id)
    return Candidate(ref, key, content, position, target, record, given)


def hashed(site_key: bytes, kind: str, name: str) -> str:
    """Keyed hash (hex) of a case's or patient's name; cannot be guessed without the site's key."""
    text = f"{kind}\0{name}".encode("utf-8", "surrogateescape")
    return hmac.digest(site_key, text, "sha256").hex()[:32]
