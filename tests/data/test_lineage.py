"""A hospital can say which rounds were trained on a patient, and its file names nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medfl.client.cli import main
from medfl.client.data.candidates import hashed
from medfl.client.data.cases import Case, Cohort, Split
from medfl.client.data.lineage import Used, lineage_path, record_round, rounds_with
from medfl.client.deid.keys import cases_key, load_secret, secret_path
from medfl.common.errors import StorageError
from medfl.common.site import load_site


def cohort(**parts: Split) -> Cohort:
    cases = tuple(Case(key=f"k{p}", patient=p, split=s) for p, s in parts.items())
    return Cohort(cases, inputs=(), targets=())


def test_only_rounds_that_trained_on_the_patient_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lineage"
    first, second = cohort(a="train", b="train", c="test"), cohort(a="train")
    rounds = [
        Used("s", "r", "c1", 1, "m1"),
        Used("s", "r", "c1", 2, "m2"),
        Used("t", "r", "c2", 1, "m3"),
    ]
    for used in rounds:
        record_round(path, first if used.cohort == "c1" else second, used)
    record_round(path, first, rounds[0])  # The same answer, asked for again.
    assert rounds_with(path, "a") == tuple(rounds)
    assert rounds_with(path, "b") == tuple(rounds[:2])
    assert rounds_with(path, "c") == ()
    assert rounds_with(tmp_path / "none", "a") == ()
    assert len(path.read_text().splitlines()) == 5
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_an_error_and_not_an_all_clear(tmp_path: Path) -> None:
    path = tmp_path / "lineage"
    record_round(path, cohort(a="train"), Used("s", "r", "c1", 1, "m1"))
    path.write_text(path.read_text()[:-9])
    with pytest.raises(StorageError, match="damaged"):
        rounds_with(path, "a")


def test_the_command_finds_a_patient_by_the_hospitals_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site_file = tmp_path / "site.toml"
    site_file.write_text('name = "a"\n[data]\nformat = "dicom"\npath = "."\n')
    site = load_site(site_file)
    patient = hashed(cases_key(load_secret(secret_path(site))), "patient", "HOSP-7")
    record_round(lineage_path(site), cohort(**{patient: "train"}), Used("s", "r", "c1", 3, "m1"))
    assert "HOSP-7" not in lineage_path(site).read_text()
    assert main(["lineage", str(site_file), "HOSP-7", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain == [{"study": "s", "run": "r", "cohort": "c1", "round": 3, "model": "m1"}]
    assert main(["lineage", str(site_file), "HOSP-8"]) == 0
    assert "No round" in capsys.readouterr().out
