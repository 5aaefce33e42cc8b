"""Records: one line of a table a case."""

from __future__ import annotations

from medfl.client.data.cases import CaseRef, Found, Picture
from medfl.client.readers.rows import read_rows
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import Study


def find(source: DataSource, study: Study) -> Found:
    """Every row is a case; without a case or patient column the row's number stands for them.

    Where site.toml maps a column as `visit`, a patient's rows are told apart by it.
    """
    cases = []
    visits = "visit" in (source.columns or {})
    for number, row in enumerate(read_rows(source, source.table or source.path), 1):
        case_id = row.get("case") or row.get("patient") or f"row {number}"
        if visits and row["visit"]:
            case_id = f"{case_id} / {row['visit']}"
        patient = row.get("patient") or row.get("case") or case_id
        cases.append(CaseRef(case_id, patient, index=number - 1, fields=row))
    return Found(tuple(cases))


def no_image(ref: CaseRef, study: Study) -> Picture:
    """A record has no picture. Raises CaseError."""
    raise CaseError("no_image", "a table of records holds no pictures")
