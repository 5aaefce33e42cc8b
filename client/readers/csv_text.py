"""A hospital's CSV file as lines of cells: its encoding and delimiter as said, else as it shows."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from medfl.common.errors import DataError
from medfl.common.source import DataSource

# A cell longer than this is not a value; it is a damaged file or an attack on the reader.
_MAX_CELL = 1_000_000
_DELIMITERS = (",", ";", "\t", "|")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def lines_of_csv(source: DataSource, path: Path) -> list[list[str]]:
    """The file's lines without empty ones, each as its cells. Raises DataError."""
    csv.field_size_limit(_MAX_CELL)
    text = _decoded(source, path)
    first, _, rest = text.partition("\n")
    said = source.delimiter
    if first.strip().strip('"').lower().startswith("sep=") and len(first.strip().strip('"')) == 5:
        # A spreadsheet's own line about its delimiter.
        text, said = rest, said or first.strip().strip('"')[4]
    if said is not None:
        return _split(text, said, path)
    return _split(text, _delimiter(text, source, path), path)


def _decoded(source: DataSource, path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError("The table of the cases is absent. Check `table` in site.toml.") from None
    except OSError as error:
        raise DataError(f"The table {path.name} cannot be read: {error.strerror}.") from None
    bom = next((name for mark, name in _BOMS if raw.startswith(mark)), None)
    try:
        return raw.decode(bom or source.encoding or "utf-8")
    except LookupError:
        raise DataError(
            f'encoding = "{source.encoding}" in site.toml is none that Python knows. Write for '
            'example "utf-8", "cp1252" (Windows, Western Europe) or "cp932" (Japan).'
        ) from None
    except UnicodeDecodeError as error:
        if source.encoding is not None and bom is None:
            raise DataError(
                f"The table {path.name} is not in the encoding {source.encoding} that site.toml "
                f"names: {error.reason} at byte {error.start}. Correct `encoding`."
            ) from None
        raise DataError(
            f"The table {path.name} is not in UTF-8: {error.reason} at byte {error.start}. Write "
            'its `encoding` into [data] of site.toml, such as "cp1252" (Windows, Western Europe), '
            "or save it as CSV UTF-8."
        ) from None


def _split(text: str, delimiter: str, path: Path) -> list[list[str]]:
    if 4 * text.count("\0") > len(text):  # one in a cell costs that line alone
        raise DataError(
            f"The table {path.name} holds NUL characters: it is no text, or in UTF-16 without a "
            'mark at its begin. Write encoding = "utf-16-le" into [data] of site.toml, or save it '
            "as CSV UTF-8."
        )
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (csv.Error, TypeError) as error:
        raise DataError(
            f"The table {path.name} is not a CSV file: {error}. Check `delimiter` in site.toml and "
            "the quotes in the table."
        ) from None
    return [line for line in lines if any(cell.strip() for cell in line)]


def _delimiter(text: str, source: DataSource, path: Path) -> str:
    """The one delimiter that gives every line as many cells, among them the mapped columns'."""
    fits = []
    for delimiter in _DELIMITERS:
        try:
            lines = _split(text, delimiter, path)
        except DataError:
            continue
        if _fits(lines, source):
            fits.append(delimiter)
    if len(fits) > 1:
        names = ", ".join(map(repr, fits))
        raise DataError(
            f"The table {path.name} can be read with the delimiters {names}. Write the right one "
            "as `delimiter` into [data] of site.toml."
        )
    return fits[0] if fits else ","


def _fits(lines: Sequence[Sequence[str]], source: DataSource) -> bool:
    widths = {len(line) for line in lines}
    if len(widths) != 1 or widths == {1}:
        return False
    if source.header:
        return widths == {len(source.header)}
    header = {cell.strip() for cell in lines[0]}
    return set((source.columns or {}).values()) <= header
