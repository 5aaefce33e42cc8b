"""Where a hospital's cases lie: `[data]` of site.toml, and of a study's `[simulation]`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from medfl.common.written import written

Format = Literal["dicom", "nifti", "image", "decathlon", "medmnist", "hdf5", "table"]


def _orientation(letters: str) -> str:
    """One of each pair R/L, A/P, S/I, in any order."""
    pairs = {"R": "x", "L": "x", "A": "y", "P": "y", "S": "z", "I": "z"}
    if sorted(pairs.get(c, "?") for c in letters) != ["x", "y", "z"]:
        raise PydanticCustomError(
            "orientation", 'Input should be one of each pair R/L, A/P, S/I, such as "RAS"'
        )
    return letters


Orientation = Annotated[str, AfterValidator(_orientation)]


@written
class DataSource:
    """One collection of cases on a hospital's disk.

    path: a folder or file. Relative paths start at the folder of the file that names them.
    table: CSV with one line a case (or an image); gives patient, files, label, split. Formats that
        carry their own list (decathlon, medmnist, hdf5) and plain folders do without.
    columns: the names this hospital uses for what the study speaks of. Keys: patient, case, image,
        mask, label, split, or a feature of the study; for DICOM also instance, series, study (UIDs)
        and accession, for records visit; values: column names of the table. A line belongs to an
        image by its image, UID and accession columns, without those by case, else by patient.
    header: column names of a table that has no first line with names.
    delimiter: between a line's cells; omitted, the one that gives all lines as many cells.
    encoding: of the table, such as "cp1252"; omitted, UTF-8 or as the file's first bytes say.
    decimal: the mark in numbers, "." or ","; omitted, as other numbers of the column show it.
    values: this hospital's words for what the study speaks of, by the study's name of the column:
        { label = { ja = "yes", nein = "no" }, sex = { w = "f" } }; before the study's `label_map`.
        For masks: { mask = { "GTV 1" = "tumour", "SCT:10200004" = "liver", "128" = "tumour" } }, a
        structure's label or code, or a value.
    masks: folder of the masks, for formats where they lie apart.
    orientation: of NIfTI files whose header does not say where they lie (qform_code and sform_code
        0): where the stored axes run to, such as "RAS". Without it such files are left out.
    missing: texts that stand for "no value" in the table.
    """

    format: Format
    path: Path
    table: Path | None = None
    columns: dict[str, str] | None = None
    header: list[str] | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    encoding: str | None = None
    decimal: Literal[".", ","] | None = None
    values: dict[str, dict[str, str]] | None = None
    masks: Path | None = None
    orientation: Orientation | None = None
    missing: tuple[str, ...] = ("", "?", "NA", "N/A", "NaN", "nan", "null")

    def below(self, folder: Path) -> Self:
        """The same source with relative paths starting at `folder`."""

        def place(path: Path | None) -> Path | None:
            return None if path is None else folder / path

        return replace(
            self, path=folder / self.path, table=place(self.table), masks=place(self.masks)
        )

    def column(self, name: str) -> str:
        """This hospital's column for what the study calls `name`."""
        return (self.columns or {}).get(name, name)


@written
class DataSet(DataSource):
    """One of several collections of a hospital, with the studies that it serves.

    studies: names of studies, or patterns of names such as "chest-*". A study that no data set
        names, or two name, is not served: which cases it gets is never guessed.
    """

    studies: Annotated[list[str], Field(min_length=1)]

    @property
    def source(self) -> DataSource:
        """The collection without the studies that it serves."""
        return DataSource(**{f.name: getattr(self, f.name) for f in fields(DataSource)})
