"""A hospital's CSV table, row by row, and the files that its rows name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from medfl.client.data.cases import CaseRef, Found, Quarantined
from medfl.client.readers.csv_text import lines_of_csv
from medfl.client.readers.lines import disagreeing
from medfl.common.codes import difference, folded, level
from medfl.common.errors import CaseError, DataError
from medfl.common.source import DataSource
from medfl.common.study import Study


def read_rows(source: DataSource, path: Path) -> list[dict[str, str]]:
    """The table's rows as texts: every column under its own name, and under the study's name too.

    Raises:
        DataError: the table is absent, not text, has ragged rows or lacks a named column.
    """
    lines = _without_empty_end(lines_of_csv(source, path))
    header = source.header or ([cell.strip() for cell in lines[0]] if lines else [])
    body = lines if source.header else lines[1:]
    _check_header(source, header, path)
    return [_row(source, header, line, number, path) for number, line in enumerate(body, 1)]


def _without_empty_end(lines: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Without the columns at the right that are empty in every line, as spreadsheets leave them."""
    width = max((len(line) for line in lines), default=0)
    if any(len(line) != width for line in lines):
        return list(lines)
    while width and not any(line[width - 1].strip() for line in lines):
        width -= 1
    return [line[:width] for line in lines]


def _check_header(source: DataSource, header: Sequence[str], path: Path) -> None:
    if len(set(header)) != len(header):
        raise DataError(f"The table {path.name} names a column twice. Give each its own name.")
    absent = sorted(set((source.columns or {}).values()) - set(header))
    if absent:
        raise DataError(
            f"The table {path.name} has no column {', '.join(absent)}; it has "
            f"{', '.join(header)}. Correct `columns` in site.toml."
        )


def _row(
    source: DataSource, header: Sequence[str], line: Sequence[str], number: int, path: Path
) -> dict[str, str]:
    if len(line) != len(header):
        raise DataError(
            f"Row {number} of the table {path.name} has {len(line)} values for {len(header)} "
            "columns. Check its delimiter and quotes."
        )
    row = {name: cell.strip() for name, cell in zip(header, line, strict=True)}
    row |= {name: row[column] for name, column in (source.columns or {}).items()}
    return row | {
        name: texts.get(row[name], row[name])
        for name, texts in (source.values or {}).items()
        if name in row
    }


def confined(root: Path, path: Path) -> Path:
    """`path` if it is a plain file below `root`, links followed.

    Raises:
        CaseError: "path_outside", "file_missing" or "not_a_plain_file".
    """
    if "\0" in str(path):
        raise CaseError("path_outside", "a file name holds a NUL character")
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        raise CaseError("path_outside", path.name)
    try:
        mode = real.stat().st_mode
    except OSError:
        raise CaseError("file_missing", path.name) from None
    if not stat.S_ISREG(mode):
        raise CaseError("not_a_plain_file", path.name)
    return path


def stem(path: Path, suffixes: Sequence[str]) -> str:
    """The file's name without its suffix; knows double ones such as .nii.gz."""
    for suffix in sorted(suffixes, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def closed_folder(error: OSError) -> None:
    """For os.walk, which would pass over a folder in silence. Raises DataError."""
    raise DataError(
        f"The folder {error.filename} cannot be opened ({error.strerror}), so that nobody knows "
        "which cases are in it. Let the account that runs medfl-client read it, or move it out of "
        "`path` of site.toml."
    )


def files_below(root: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files with one of the suffixes below a folder, sorted, hidden ones left out."""
    for folder, folders, names in os.walk(root, onerror=closed_folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(tuple(suffixes)):
                yield Path(folder) / name


def locate(root: Path, text: str, suffixes: Sequence[str]) -> Path:
    """The file that a table's cell names, with or without its suffix. Raises CaseError."""
    if not text:
        raise CaseError("file_missing", "the table names no file")
    if "\0" in text:
        raise CaseError("path_outside", "a file name holds a NUL character")
    for candidate in (root / text, *(root / f"{text}{suffix}" for suffix in suffixes)):
        if candidate.is_file():
            return confined(root, candidate)
    return confined(root, root / text)


def find_in_table(source: DataSource, study: Study, suffixes: Sequence[str]) -> Found:
    """Cases of a table whose rows name an image file and perhaps a mask file each.

    Rows that name one file and disagree in what the study uses are left out, all of them.
    """
    by_file: dict[Path, list[CaseRef]] = {}
    faulty: list[Quarantined] = []
    path = source.table
    if path is None:
        raise DataError("This format needs a table here. Name it as `table` in site.toml.")
    alike = Alike(source.path, suffixes)
    for number, row in enumerate(read_rows(source, path), 1):
        name = row.get("image") or row.get("case", "")
        case_id = row.get("case") or name or f"row {number}"
        try:
            file, respelled = _located(source.path, name, suffixes, alike)
            masks = mask_of(source, row, file, suffixes)
        except CaseError as error:
            faulty.append(Quarantined(case_id, error.reason, error.detail))
            continue
        patient = row.get("patient") or case_id
        ref = CaseRef(case_id, patient, (file,), masks, fields=row, respelled=respelled)
        by_file.setdefault(Path(os.path.realpath(file)), []).append(ref)
    cases = []
    for refs in by_file.values():
        if disagreeing(refs, source, study):
            detail = f"{len(refs)} rows name its file and disagree"
            faulty += [Quarantined(ref.case_id, "ambiguous_line", detail) for ref in refs]
        else:
            cases += refs
    return Found(tuple(cases), tuple(faulty))


def _located(root: Path, name: str, suffixes: Sequence[str], alike: Alike) -> tuple[Path, bool]:
    """The file of a row, and whether it was found only as the code that a spreadsheet wrote."""
    try:
        return locate(root, name, suffixes), False
    except CaseError as error:
        if error.reason != "file_missing" or not name:
            raise
        if level(name) != name:
            with suppress(CaseError):
                return locate(root, level(name), suffixes), True
        if (like := alike.to(name)) is not None:
            raise CaseError("name_differs", difference(name, like, "folder")) from None
        raise


class Alike:
    """Files of a folder by how their names look; listed only when somebody asks."""

    def __init__(self, root: Path, suffixes: Sequence[str]) -> None:
        self._root, self._suffixes = root, suffixes
        self._names: dict[str, str] | None = None

    def to(self, name: str) -> str | None:
        """A file whose name, with or without suffix, looks like this one; None where none does."""
        if self._names is None:
            self._names = {}
            for file in files_below(self._root, self._suffixes):
                inside = str(file.relative_to(self._root))
                bare = inside[: len(inside) - len(file.name)] + stem(file, self._suffixes)
                self._names |= {folded(bare): inside, folded(inside): inside}
        return self._names.get(folded(name))


MASK_SUFFIXES = (".nii.gz", ".nii", ".png", ".tif", ".tiff", ".gif")
_MASK_ENDS = ("_mask", "_seg", "_label", "-mask", "-seg", "-label")


def mask_of(
    source: DataSource, row: dict[str, str], image: Path, suffixes: Sequence[str]
) -> tuple[Path, ...]:
    """The mask of an image: the table's mask cell, else the same name in the masks' folder.

    Raises CaseError where the table names a file that is not there.
    """
    if row.get("mask"):
        return (locate(source.masks or source.path, row["mask"], MASK_SUFFIXES),)
    name = stem(image, suffixes)
    if source.masks is None:
        there = [image.parent / f"{name}{e}{s}" for e in _MASK_ENDS for s in MASK_SUFFIXES]
        return only_mask(source.path, there)
    names = [f"{name}{end}{s}" for end in ("", *_MASK_ENDS) for s in MASK_SUFFIXES]
    inside = source.masks / image.parent.relative_to(source.path)
    for folder in dict.fromkeys((inside, source.masks)):
        found = only_mask(source.masks, [folder / n for n in names if folder / n != image])
        if found:
            return found
    return ()


def only_mask(root: Path, candidates: Sequence[Path]) -> tuple[Path, ...]:
    """The one of these that is there, or (). Raises CaseError("several_masks"), as `confined`."""
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        raise CaseError("several_masks", ", ".join(path.name for path in found[:5]))
    return tuple(confined(root, path) for path in found)


def find_in_folder(source: DataSource, suffixes: Sequence[str], *, folder_is: str) -> Found:
    """Cases of a plain folder: every image that is not another one's mask.

    folder_is: what a sub-folder of the first level names, "patient" or "label"; images that lie
    directly in the folder are their own patients.
    """
    cases: list[CaseRef] = []
    faulty: list[Quarantined] = []
    for file in files_below(source.path, suffixes):
        inside = file.relative_to(source.path)
        name = stem(file, suffixes)
        if name.endswith(_MASK_ENDS) or (source.masks and file.is_relative_to(source.masks)):
            continue
        fields = {"image": str(inside)}
        patient = str(inside.parent / name)
        if len(inside.parts) > 1:
            fields[folder_is] = inside.parts[0]
            patient = fields.get("patient", patient)
        try:
            confined(source.path, file)
            masks = mask_of(source, {}, file, suffixes)
        except CaseError as error:
            faulty.append(Quarantined(str(inside), error.reason, error.detail))
            continue
        cases.append(CaseRef(str(inside.parent / name), patient, (file,), masks, fields=fields))
    return Found(tuple(cases), tuple(faulty))
