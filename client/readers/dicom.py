"""DICOM series and single images, read by a limited child process.

A case of a 3-D study is a series of slices or one multi-frame file; of a 2-D study, one file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from medfl.client.data.cases import CaseRef, Found, Picture, Quarantined
from medfl.client.readers import image as images
from medfl.client.readers import nifti, sandbox
from medfl.client.readers.dicom_broken import Broken, series_without_slices
from medfl.client.readers.dicom_item import Item
from medfl.client.readers.dicom_masks import DRAWN, Masks, masks_of
from medfl.client.readers.dicom_values import filled
from medfl.client.readers.lines import join, lines_of
from medfl.client.readers.rows import closed_folder, confined, only_mask, read_rows
from medfl.client.readers.structures import names_of
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import Study

log = logging.getLogger(__name__)

# What archives and people put beside DICOM files; silently passed over.
_BESIDE = (".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".pdf", ".log", ".toml", ".ini")
_NAMES_BESIDE = ("readme", "license", "version", "lockfile", "autorun.inf", "thumbs.db")
_MASKS = (".nii.gz", ".nii", ".png", ".tif", ".tiff", ".gif")
_ENDINGS = ("", ".dcm", ".dicom", ".dic", ".ima", ".img")
_CHUNK = 64
# Each is a process with pydicom in it, about 100 MB.
_SCANNERS = min(16, len(os.sched_getaffinity(0)))
_HEADER_S = 60.0
_FILE_S = 20.0


def find(source: DataSource, study: Study) -> Found:
    """Group the files of a folder tree by patient, study and series, and match table and masks."""
    items, broken = _scan(source.path)
    faulty = [_quarantined(b, source.path) for b in broken]
    images_found = [i for i in items if i.header["kind"] == "image"]
    drawn = [i for i in items if i.header["kind"] in DRAWN]
    if source.masks is not None and not source.masks.is_relative_to(source.path):
        more, also_faulty = _scan(source.masks)
        drawn += [i for i in more if i.header["kind"] in DRAWN]
        faulty += [_quarantined(b, source.masks) for b in also_faulty]
    dimensions = study.image.dimensions if study.image else 3
    images_found, again, copies = _without_copies(images_found, dimensions)
    masks = Masks()
    if study.task.kind == "segmentation":
        masks = masks_of(drawn, images_found)
    reported = [q.case_id for q in faulty]
    if dimensions == 3:
        whole, lacking, told = _whole_series(images_found, broken, source.path)
        faulty = [*lacking, *(q for q in faulty if q.case_id not in told)]
        reported += _names_in_table(images_found, {q.case_id for q in lacking})
        images_found = whole
    cases = [_case(group, dimensions) for group in _groups(images_found, dimensions)]
    if source.table is not None:
        cases, unlisted = _with_table(cases, source, study, reported, copies)
    else:
        unlisted = []
    cases, unmasked = _with_masks(cases, source, masks.by_series)
    return Found(tuple(cases), (*faulty, *again, *unlisted, *unmasked, *masks.alone))


def _files(root: Path) -> Iterator[tuple[Path, bool]]:
    """(file, plain?) below a folder, sorted; links are never followed."""
    for folder, folders, names in os.walk(root, onerror=closed_folder, followlinks=False):
        links = [f for f in folders if (Path(folder) / f).is_symlink()]
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in links)
        for name in sorted([*names, *links]):
            path = Path(folder) / name
            passed = name.lower().endswith((*_BESIDE, *_MASKS)) or name.lower() in _NAMES_BESIDE
            if not name.startswith(".") and not passed:
                yield path, stat.S_ISREG(path.lstat().st_mode)


def _scan(root: Path) -> tuple[list[Item], list[Broken]]:
    items: list[Item] = []
    faulty: list[Broken] = []
    plain: list[Path] = []
    for path, is_plain in _files(root):
        if is_plain:
            plain.append(path)
        else:
            faulty.append(Broken(path, "not_a_plain_file", ""))
    step = max(1, min(_CHUNK, -(-len(plain) // _SCANNERS)))  # few files, too, go to all of them
    chunks = [plain[start : start + step] for start in range(0, len(plain), step)]
    with ThreadPoolExecutor(min(_SCANNERS, max(1, len(chunks)))) as pool:
        headers = [header for part in pool.map(_headers, chunks) for header in part]
    for path, header in zip(plain, headers, strict=True):
        if "reason" in header:
            series = header.get("series", "")
            faulty.append(Broken(path, header["reason"], header["detail"], series))
        else:
            items.append(Item(path, header))
    return items, faulty


def _quarantined(broken: Broken, root: Path) -> Quarantined:
    reason = broken.reason
    ending = broken.path.suffix.lower()
    # Another ending than DICOM's, which may also be the last number of a UID: it never was one.
    if reason == "not_dicom" and ending not in _ENDINGS and not ending[1:].isdecimal():
        reason = "other_file"
    return Quarantined(str(broken.path.relative_to(root)), reason, broken.detail)


def _whole_series(
    items: Sequence[Item], broken: Sequence[Broken], root: Path
) -> tuple[list[Item], list[Quarantined], set[str]]:
    """The items of series without a broken slice, the others as one case each, and the files
    whose fault is told by that. A series without its last slice would look like a whole one."""
    lacking = series_without_slices(broken, [(i.path, i.header) for i in items])
    # A multi-frame file is whole by itself.
    alone = {i.header["series"] for i in items if i.header["frames"] > 1}
    lacking = {series: files for series, files in lacking.items() if series not in alone}
    aside = [
        Quarantined(series, files[0].reason, f"{len(files)} of its files: {_names_of(files, root)}")
        for series, files in sorted(lacking.items())
    ]
    told = {str(b.path.relative_to(root)) for files in lacking.values() for b in files}
    return [i for i in items if i.header["series"] not in lacking], aside, told


def _names_in_table(items: Sequence[Item], series: set[str]) -> list[str]:
    """By what a table's rows may name these series."""
    keys = ("series", "study", "accession", "patient")
    return [i.header[k] for i in items if i.header["series"] in series for k in keys]


def _names_of(files: Sequence[Broken], root: Path) -> str:
    shown = ", ".join(str(b.path.relative_to(root)) for b in files[:3])
    return f"{shown} {files[0].detail}".strip()


def _headers(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One header a file; where one file brings the child down, the others are read without it."""
    try:
        request = {"command": "headers", "files": [str(p) for p in paths]}
        headers: list[dict[str, Any]] = sandbox.ask(request, _HEADER_S).plain["headers"]
        return headers
    except CaseError as error:
        if len(paths) == 1:
            return [{"reason": error.reason, "detail": error.detail}]
        return [header for path in paths for header in _headers([path])]


def _without_copies(
    items: Sequence[Item], dimensions: int
) -> tuple[list[Item], list[Quarantined], dict[Path, list[Path]]]:
    """Copies of an instance are passed over; two contents under one UID set both aside, in 3-D
    with all of their series: without a slice they would look like whole ones.

    A series that was copied as a whole is reported as one copy, not as one a slice. The third
    value says where the copies of a kept file lie, for a table may name those.
    """
    by_uid: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_uid[item.header["instance"]].append(item)
    kept: list[Item] = []
    copied: set[str] = set()
    copies: dict[Path, list[Path]] = {}
    torn: dict[str, str] = {}
    for uid, same in by_uid.items():
        contents = _contents([item.path for item in same])
        if len(contents) > 1:
            detail = f"{len(contents)} different files have the instance {uid}"
            torn |= {i.header["series"] if dimensions == 3 else uid: detail for i in same}
            continue
        if len(same) > 1:
            copied.add(uid if dimensions == 2 else same[0].header["series"])
            copies[same[0].path] = [item.path for item in same[1:]]
        kept.append(same[0])
    if dimensions == 3:
        kept = [item for item in kept if item.header["series"] not in torn]
        copied -= torn.keys()
    aside = [Quarantined(name, "uid_conflict", detail) for name, detail in sorted(torn.items())]
    return kept, [*aside, *(Quarantined(n, "duplicate") for n in sorted(copied))], copies


def _contents(paths: Sequence[Path]) -> set[str]:
    """The different contents of files with one UID: by their bytes, else by what they show.

    An archive that exports an image again may write it in another transfer syntax.
    """
    if len(paths) == 1:
        return {""}
    by_bytes = {_digest(path) for path in paths}
    if len(by_bytes) == 1:
        return by_bytes
    try:
        request = {"command": "contents", "files": [str(p) for p in paths]}
        return set(sandbox.ask(request, _FILE_S * len(paths)).plain["contents"])
    except CaseError:
        return by_bytes


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _groups(items: Sequence[Item], dimensions: int) -> list[list[Item]]:
    """The files of each case, in the order of their place in the body."""
    if dimensions == 2:
        return [[item] for item in sorted(items, key=lambda i: i.header["instance"])]
    series: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        header = item.header
        alone = header["instance"] if header["frames"] > 1 else ""
        series[(header["patient"], header["study"], header["series"], alone)].append(item)
    return [
        sorted(group, key=lambda i: (i.height, i.header["instance"]))
        for _, group in sorted(series.items())
    ]


def _case(group: Sequence[Item], dimensions: int) -> CaseRef:
    header = group[0].header
    single = dimensions == 2 or header["frames"] > 1
    fields = {
        "study_uid": header["study"],
        "series_uid": header["series"],
        "instance_uid": header["instance"] if single else "",
        "accession": header["accession"],
        "frame_of_reference": header["frame_of_reference"],
        "header_patient": header["patient"],
        "mosaic": "yes" if header["mosaic"] else "",
    }
    size = (*header["size"], len(group) * header["frames"])
    return CaseRef(
        case_id=header["instance"] if single else header["series"],
        patient=header["patient"] or header["study"],
        files=tuple(item.path for item in group),
        fields=fields,
        size=size if dimensions == 3 else (size[1], size[0]),
    )


def _with_table(
    cases: Sequence[CaseRef],
    source: DataSource,
    study: Study,
    faulty: Sequence[str],
    copies: Mapping[Path, Sequence[Path]],
) -> tuple[list[CaseRef], list[Quarantined]]:
    """Join each case with its line (`lines.join`). Cases without one are not part of the study.

    faulty: files and series that were set aside already; their lines are not reported once more.
    """
    lines = lines_of(read_rows(source, source.table or source.path), source)
    names = []
    for ref in cases:
        places = [p.relative_to(source.path) for p in (ref.files[0], *copies.get(ref.files[0], ()))]
        names.append(_names(ref, places))
    joined, aside, left = join(cases, names, lines, source, study)
    passed = [p.relative_to(source.path) for others in copies.values() for p in others]
    known = {str(f) for p in (*map(Path, faulty), *passed) for f in (p, *p.parents)}
    absent = dict.fromkeys(line.name for line in left if line.name not in known)
    return joined, [*aside, *(Quarantined(name, "no_image") for name in absent)]


def _names(ref: CaseRef, places: Sequence[Path]) -> dict[str, list[str]]:
    """What a table's line may call a case, by the column. places: of its file and copies."""

    def paths(places: Sequence[Path]) -> list[str]:
        files = [str(name) for p in places for name in (p, p.with_suffix(""))]
        return [*files, *(str(f) for p in places for f in p.parents if str(f) != ".")]

    headers = {"instance": "instance_uid", "series": "series_uid", "study": "study_uid"}
    names = {kind: [ref.fields[name]] for kind, name in headers.items() if ref.fields[name]}
    names["accession"] = [ref.fields["accession"]] if ref.fields["accession"] else []
    names["patient"] = [ref.fields["header_patient"]] if ref.fields["header_patient"] else []
    return {"image": paths(places[:1]), "copies": paths(places[1:]), **names}


def _with_masks(
    cases: Sequence[CaseRef], source: DataSource, by_series: Mapping[str, Sequence[Path]]
) -> tuple[list[CaseRef], list[Quarantined]]:
    """Give each case its mask: the table's, else that of its series, else a file of its name."""
    kept: list[CaseRef] = []
    aside: list[Quarantined] = []
    for ref in cases:
        try:
            kept.append(replace(ref, mask_files=_mask(ref, source, by_series)))
        except CaseError as error:
            aside.append(Quarantined(ref.case_id, error.reason, error.detail))
    return kept, aside


def _mask(
    ref: CaseRef, source: DataSource, by_series: Mapping[str, Sequence[Path]]
) -> tuple[Path, ...]:
    root = source.masks or source.path
    if ref.fields.get("mask"):
        return (confined(root, root / ref.fields["mask"]),)
    found = by_series.get(ref.fields["series_uid"], [])
    if len(found) > 1:
        raise CaseError("several_masks", f"{len(found)} segmentations of one series")
    if found:
        return (found[0],)
    names = [ref.case_id, ref.fields["series_uid"], ref.files[0].stem, ref.patient]
    # An identifier is a name, never a path: nothing may lead out of the folder.
    plain = dict.fromkeys(n for n in names if n and Path(n).name == n)
    there = [root / f"{n}{end}" for n in plain for end in _MASKS] if source.masks else []
    return only_mask(root, there)


def load(ref: CaseRef, study: Study) -> Picture:
    """One case's image with its place. Raises CaseError."""
    if ref.fields.get("mosaic"):
        raise CaseError("mosaic")
    dimensions = study.image.dimensions if study.image else 3
    request = {
        "command": "image",
        "files": [str(p) for p in ref.files],
        "dimensions": dimensions,
    }
    return _picture(sandbox.ask(request, _FILE_S + len(ref.files)))


def load_mask(ref: CaseRef, study: Study) -> Picture:
    """One case's mask: DICOM SEG by geometry, NIfTI by affine, PNG by rows and columns."""
    if not ref.mask_files:
        raise CaseError("mask_missing")
    file = ref.mask_files[0]
    if file.name.lower().endswith(nifti.SUFFIXES):
        return nifti.load_mask(ref, study)
    if file.name.lower().endswith(images.SUFFIXES):
        return images.load_mask(ref, study)
    request = {
        "command": "segmentation",
        "mask": str(file),
        "files": [str(p) for p in ref.files],
        "dimensions": study.image.dimensions if study.image else 3,
        "names": asdict(names_of(study.task)),
    }
    # The child has looked the segments up: what it gives are the study's class numbers.
    return replace(_picture(sandbox.ask(request, _FILE_S + len(ref.files))), classed=True)


def _picture(answer: sandbox.Answer) -> Picture:
    if answer.array is None:
        raise CaseError("unreadable", "the file holds no pixels")
    affine, spacing = answer.plain["affine"], answer.plain["spacing_mm"]
    array, outside = filled(answer.array, answer.plain.get("background"))
    return Picture(
        array,
        None if affine is None else np.array(affine),
        None if spacing is None else tuple(spacing),
        None if outside is None else np.asarray(outside.any(axis=0)),
    )
