"""Tables as hospitals have them: other delimiters, encodings, decimal marks and words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.client.data.cohort import build_cohort, find_cases
from medfl.client.readers.rows import read_rows
from medfl.common.errors import DataError
from medfl.common.site import load_site
from medfl.common.source import DataSource
from medfl.common.study import Feature, Quality, RecordInput, Study

LENIENT = Quality(max_quarantined=0.9, min_cases=1)


def table(folder: Path, text: str | bytes, **more: Any) -> DataSource:
    raw = text.encode() if isinstance(text, str) else text
    (folder / "t.csv").write_bytes(raw)
    return DataSource(format="table", path=folder / "t.csv", **more)


def rows(source: DataSource) -> list[dict[str, str]]:
    return read_rows(source, source.path)


PLAIN = "id;age\r\n1;40\r\n2;50\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        PLAIN.encode(),
        PLAIN.replace(";", ",").encode("utf-8-sig"),
        PLAIN.replace(";", "\t").encode("utf-16"),
        b"sep=;\r\n" + PLAIN.encode(),
        b"sep=,\r\n" + PLAIN.replace(";", ",").encode(),
        PLAIN.replace("\r\n", ";;\r\n").encode(),
    ],
    ids=["semicolons", "commas", "utf-16 tabs", "sep=;", "sep=,", "empty columns"],
)
def test_delimiter_and_encoding_are_found_where_they_are_not_said(
    tmp_path: Path, raw: bytes
) -> None:
    assert rows(table(tmp_path, raw)) == [{"id": "1", "age": "40"}, {"id": "2", "age": "50"}]


def test_an_encoding_is_never_guessed(tmp_path: Path) -> None:
    raw = "id,label\nM\u00fcller,yes\n".encode("cp1252")
    with pytest.raises(DataError, match=r"not in UTF-8.*`encoding`.*cp1252"):
        rows(table(tmp_path, raw))
    assert rows(table(tmp_path, raw, encoding="cp1252"))[0]["id"] == "M\u00fcller"
    with pytest.raises(DataError, match="none that Python knows"):
        rows(table(tmp_path, raw, encoding="latin-ish"))


def test_a_table_that_two_delimiters_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="delimiters ',', ';'"):
        rows(table(tmp_path, "a,b;c\n1,2;3\n"))
    assert rows(table(tmp_path, "a,b;c\n1,2;3\n", delimiter=";")) == [{"a,b": "1,2", "c": "3"}]
    columns = {"label": "b;c"}
    assert rows(table(tmp_path, "a,b;c\n1,2;3\n", columns=columns))[0]["label"] == "2;3"


@pytest.mark.parametrize(
    ("texts", "decimal", "right"),
    [
        ("3,5 2,25 7", None, [3.5, 2.25, 7]),
        ("3.5 1.234 7", None, [3.5, 1.234, 7]),
        ("1.234 5.678", None, [1.234, 5.678]),
        ("3,5 1,234", None, [3.5, 1.234]),
        ("3,5 1.234", None, [3.5]),  # 1234 or 1.234?
        ("1,234 5,678", None, []),
        ("1,234 5.678 7", None, [7]),
        ("3,5 4.5 1.234 0.125", None, [3.5, 4.5, 0.125]),
        ("1,234 5,678", ",", [1.234, 5.678]),
        ("3,5 4.5", ",", [3.5]),
        ("3,5 4.5", ".", [4.5]),
        ("1.234,5 7", None, [7]),
    ],
)
def test_a_decimal_mark_counts_as_the_column_shows_it_and_is_never_guessed(
    tmp_path: Path, study: Callable[..., Study], texts: str, decimal: Any, right: list[float]
) -> None:
    lines = [f"{i};{text};yes" for i, text in enumerate(texts.split())]
    source = table(tmp_path, "\n".join(["case;crp;label", *lines, "x;9;no"]), decimal=decimal)
    record = RecordInput(features=[Feature(name="crp")], scale="none")
    cohort = build_cohort(source, study("risk", record=record, quality=LENIENT), cache=None)
    assert sorted(float(str(r["crp"])) for r in cohort.records) == sorted([*right, 9])
    told = {q.reason for q in cohort.quarantined}
    assert told == ({"feature_not_a_number"} if len(right) < len(texts.split()) else set())


def test_a_hospitals_own_words_become_the_studys(
    tmp_path: Path, study: Callable[..., Study]
) -> None:
    (tmp_path / "t.csv").write_text("Pat;Geschlecht;Befund\n1;w;ja\n2;m;nein\n3;w;vielleicht\n")
    (tmp_path / "site.toml").write_text(
        'name = "h"\n[data]\nformat = "table"\npath = "t.csv"\n'
        'columns = { patient = "Pat", sex = "Geschlecht", label = "Befund" }\n'
        '[data.values]\nlabel = { ja = "yes", nein = "no" }\nsex = { w = "f" }\n'
    )
    sex = Feature(name="sex", kind="category", levels=["f", "m"])
    record = RecordInput(features=[sex], scale="none")
    data = load_site(tmp_path / "site.toml").data
    wanted = study("risk", record=record, quality=LENIENT)
    assert next(r.fields["Befund"] for r in find_cases(data, wanted).cases) == "ja"
    cohort = build_cohort(data, wanted, cache=None)
    pairs = zip(np.asarray(cohort.targets).tolist(), cohort.records, strict=True)
    assert sorted((target, row["sex"]) for target, row in pairs) == [(0, "m"), (1, "f")]
    assert [(q.case_id, q.reason) for q in cohort.quarantined] == [("3", "label_unknown")]
