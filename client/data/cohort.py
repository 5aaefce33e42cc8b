"""From a hospital's files to the checked cohort of one study."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medfl.client.data import store
from medfl.client.data.candidates import Candidate, case_error, choose, hashed
from medfl.client.data.cases import Case, CaseRef, Cohort, Found, Quarantined, Split
from medfl.client.data.fingerprints import (
    Fingerprints,
    load_fingerprints,
    save_fingerprints,
)
from medfl.client.data.marks import with_points
from medfl.client.data.preprocess import Facts, Prepared, prepare
from medfl.client.data.quality import explained, notes_on, quality_faults
from medfl.client.data.site_words import with_mask_words
from medfl.client.data.spelling import spelling_notes
from medfl.client.data.splits import split_cases
from medfl.client.readers import READERS, Reader
from medfl.client.readers.lines import disagreeing
from medfl.common.errors import DataError, StorageError
from medfl.common.site import Cache
from medfl.common.source import DataSource
from medfl.common.study import Study

Withdrawn = Callable[[CaseRef], bool]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Examined:
    """A cohort, and everything that speaks against training on it.

    faults: what stops the hospital from taking part, one message each; the last of them has the
    reasons of what is left out (`explained`), where anything is. notes: what it should know.
    listed: every case that the reader found. facts: of the usable cases' pictures, in the
    cohort's order.
    """

    cohort: Cohort
    listed: tuple[CaseRef, ...]
    facts: tuple[Facts | None, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def find_cases(source: DataSource, study: Study) -> Found:
    """List a source's cases. Raises DataError.

    Of several with one name the first stays, unless they disagree: then none does.
    """
    if not source.path.exists():
        raise DataError("The folder or file of the data is absent. Check `path` in site.toml.")
    if source.format in ("image", "nifti", "dicom", "decathlon") and not source.path.is_dir():
        raise DataError("The path of the data is not a folder. Name the folder in site.toml.")
    found = READERS[source.format].find(source, study)
    by_name: dict[str, list[CaseRef]] = {}
    features = study.record.features if study.record is not None else []
    for ref in with_points(found.cases, source, features):
        by_name.setdefault(ref.case_id, []).append(ref)
    kept: list[CaseRef] = []
    aside: list[Quarantined] = []
    for name, refs in by_name.items():
        if disagreeing(refs, source, study):
            detail = f"{len(refs)} rows have its name and disagree"
            aside += [Quarantined(name, "ambiguous_line", detail)] * len(refs)
        else:
            kept.append(replace(refs[0], orientation=source.orientation or ""))
            aside += [Quarantined(name, "duplicate_id")] * (len(refs) - 1)
    return Found(tuple(kept), (*found.quarantined, *aside))


def build_cohort(
    source: DataSource,
    study: Study,
    *,
    cache: Cache | None,
    found: Found | None = None,
    site_key: bytes = b"medfl-simulation",
    order: bytes | None = None,
    withdrawn: Withdrawn | None = None,
    n_jobs: int = 1,
    durable: bool = True,
    test_only: bool = False,
) -> Cohort:
    """List, load, check, quarantine and split a site's cases.

    found: the cases, where they are known already (a simulated hospital's share).
    site_key: keys the hashes of case and patient names. order: keys the order of the cases;
    site_key where omitted. withdrawn: says of a case whether its patient has withdrawn consent.
    n_jobs: cases prepared at the same time. durable: whether to wait until the disk has the cache.
    test_only: all cases are test cases, whatever the study's split says.

    Raises:
        DataError: the data cannot serve the study; the message says why, in counts.
        StorageError: the cache cannot be written.
    """
    examined = examine(
        source,
        study,
        cache=cache,
        found=found,
        site_key=site_key,
        order=order,
        withdrawn=withdrawn,
        n_jobs=n_jobs,
        durable=durable,
        test_only=test_only,
    )
    if examined.faults:
        raise DataError("\n".join(examined.faults))
    for note in examined.notes:
        log.info("%s", note)
    return examined.cohort


def examine(
    source: DataSource,
    study: Study,
    *,
    cache: Cache | None,
    found: Found | None = None,
    site_key: bytes = b"medfl-simulation",
    order: bytes | None = None,
    withdrawn: Withdrawn | None = None,
    n_jobs: int = 1,
    durable: bool = True,
    test_only: bool = False,
    details: bool = False,
) -> Examined:
    """`build_cohort` that collects what is wrong instead of stopping at it.

    details: also of left-out cases whose picture is in the cache, for the hospital's own eyes.

    Raises DataError only where nothing can be listed, StorageError as `build_cohort`.
    """
    study = with_mask_words(study, source)
    found = find_cases(source, study) if found is None else found
    if withdrawn is not None:
        found = _without(found, withdrawn)
    prints = load_fingerprints(cache.path) if cache is not None else Fingerprints()
    before = len(prints.known)
    candidates, faulty = choose(found, source, study, prints, site_key)
    if cache is not None and len(prints.known) != before:
        _remember(cache, prints)
    by = site_key if order is None else order
    ordered = sorted(candidates, key=lambda c: hashed(by, "case", c.ref.case_id))
    stored = _pictures(ordered, source, study, cache, n_jobs, durable)
    usable, read = [], []
    for candidate, entry in zip(ordered, stored.entries, strict=True):
        if entry.reason:
            told = entry.detail or (_detail(candidate, entry, source, study) if details else "")
            read.append(Quarantined(candidate.ref.case_id, entry.reason, told, step="reading"))
        else:
            usable.append((candidate, entry.facts))
    matched = (replace(q, step="matching") for q in faulty)
    quarantined = (*found.quarantined, *matched, *read)
    cohort, faults = _assembled(usable, stored, quarantined, study, site_key, test_only)
    facts = tuple(f for _, f in usable)
    notes = (
        *notes_on(cohort, study),
        *spelling_notes(found.cases, source, study),
        *_place_notes([candidate.ref for candidate, _ in usable]),
    )
    if faults and cohort.quarantined:
        faults.append(explained(cohort.quarantined))
    return Examined(cohort, found.cases, facts, tuple(faults), notes)


def _place_notes(usable: Sequence[CaseRef]) -> tuple[str, ...]:
    n = sum(ref.two_places for ref in usable)
    if not n:
        return ()
    return (
        f"{n} NIfTI files say two places: their qform and sform differ by more than a voxel, "
        "perhaps in left and right. The sform is used, as most programs do; look at some.",
    )


def _detail(candidate: Candidate, entry: store.Entry, source: DataSource, study: Study) -> str:
    """Why a picture is left out, in more than a word: the cache has no details, which may name a
    file, so that the picture is read once more."""
    if entry.reason == "duplicate":
        return "shows the same as another case"
    try:
        _load(candidate.ref, READERS[source.format], study)
    except Exception as error:  # noqa: BLE001  it is left out for this
        again = case_error(error)
        return again.detail if again.reason == entry.reason else ""
    return ""


def _without(found: Found, withdrawn: Withdrawn) -> Found:
    """Before any picture is read, hashed or counted."""
    out = [withdrawn(ref) for ref in found.cases]
    kept = tuple(ref for ref, gone in zip(found.cases, out, strict=True) if not gone)
    aside = [
        Quarantined(ref.case_id, "withdrawn")
        for ref, gone in zip(found.cases, out, strict=True)
        if gone
    ]
    return Found(kept, (*found.quarantined, *aside))


def _remember(cache: Cache, prints: Fingerprints) -> None:
    try:
        save_fingerprints(cache.path, prints)
    except OSError as error:
        raise StorageError(
            f"The cache in {cache.path} cannot be written: {error.strerror}. Make room or name "
            "another folder as cache.path in site.toml."
        ) from None


def _pictures(
    ordered: Sequence[Candidate],
    source: DataSource,
    study: Study,
    cache: Cache | None,
    n_jobs: int,
    durable: bool,
) -> store.Stored:
    if study.image is None:
        return store.Stored(np.zeros((0,)), None, tuple(store.Entry() for _ in ordered))
    outcomes = _outcomes(ordered, READERS[source.format], study, n_jobs)
    if cache is None or not ordered:
        return store.in_memory(outcomes)
    key = store.entry_key([c.content for c in ordered], study)
    found = store.read_entry(cache, key)
    return found or store.build_entry(cache, key, outcomes, durable=durable)


def _outcomes(
    ordered: Iterable[Candidate], reader: Reader, study: Study, n_jobs: int
) -> Iterator[store.Outcome]:
    """Prepared pictures in order; at most `2 n_jobs` at a time are in memory."""

    def one(candidate: Candidate) -> store.Outcome:
        try:
            return _load(candidate.ref, reader, study)
        except Exception as error:  # noqa: BLE001  one bad file costs its case
            return case_error(error)

    if n_jobs <= 1:
        yield from map(one, ordered)
        return
    # Threads serve: decompression, matrix products and DICOM's child processes run beside Python.
    with ThreadPoolExecutor(n_jobs) as pool:
        coming: deque[Future[store.Outcome]] = deque()
        for candidate in ordered:
            coming.append(pool.submit(one, candidate))
            if len(coming) == 2 * n_jobs:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _load(ref: CaseRef, reader: Reader, study: Study) -> Prepared:
    mask = reader.load_mask(ref, study) if study.task.kind == "segmentation" else None
    return prepare(reader.load(ref, study), mask, study)


def _assembled(
    usable: Sequence[tuple[Candidate, Facts | None]],
    stored: store.Stored,
    quarantined: tuple[Quarantined, ...],
    study: Study,
    site_key: bytes,
    test_only: bool,
) -> tuple[Cohort, list[str]]:
    candidates = [candidate for candidate, _ in usable]
    faults = quality_faults(len(candidates), quarantined, study)
    try:
        splits = _splits(candidates, study)
    except DataError as error:
        faults.append(str(error))
        splits = ["train"] * len(candidates)
    if test_only:
        splits = ["test"] * len(candidates)
    cases = tuple(
        Case(c.key, hashed(site_key, "patient", c.ref.patient), split)
        for c, split in zip(candidates, splits, strict=True)
    )
    cohort = Cohort(
        cases,
        inputs=stored.inputs if study.image is not None else (),
        targets=_targets(candidates, stored, study),
        records=tuple(c.record for c in candidates if c.record is not None),
        quarantined=quarantined,
        digest=_digest(candidates, cases, study),
    )
    return cohort, faults


def _splits(candidates: Sequence[Candidate], study: Study) -> list[Split]:
    """Each candidate's part; `shuffled` goes by the reader's order, not by the keys'."""
    order = sorted(range(len(candidates)), key=lambda i: candidates[i].position)
    listed = [candidates[i] for i in order]
    labels = [c.target for c in listed if isinstance(c.target, int)]
    parts = split_cases(
        [c.ref.patient for c in listed],
        labels if len(labels) == len(listed) else None,
        [c.given for c in listed],
        study.evaluation,
    )
    result: list[Split] = ["train"] * len(candidates)
    for place, part in zip(order, parts, strict=True):
        result[place] = part
    return result


def _targets(candidates: Sequence[Candidate], stored: store.Stored, study: Study) -> Any:
    if study.task.kind == "segmentation":
        return stored.masks if stored.masks is not None else np.zeros((0,), dtype=np.uint8)
    dtype = np.float32 if study.task.multi_label else np.int64
    if not candidates:
        return np.zeros((0,), dtype=dtype)
    return np.array([c.target for c in candidates], dtype=dtype)


def _digest(candidates: Sequence[Candidate], cases: Sequence[Case], study: Study) -> str:
    """SHA-256 over keys, patients, contents, labels, given parts and preprocessing: what a
    hospital approves."""
    plain = {
        "version": store.FORMAT_VERSION,
        "task": asdict(study.task),
        "image": asdict(study.image) if study.image else None,
        "record": asdict(study.record) if study.record else None,
        "cases": [
            [c.key, made.patient, made.split, c.content, _label(c.target)]
            for c, made in zip(candidates, cases, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def _label(target: Any) -> Any:
    return None if target is None else np.asarray(target).tolist()
