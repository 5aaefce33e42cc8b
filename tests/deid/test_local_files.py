"""What medfl keeps and shows at the hospital holds no header, no name and no file name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom.dataset import Dataset

from medfl.client.cli import main
from medfl.client.data.store import build_entry
from medfl.client.data.withdrawn import load_withdrawn
from medfl.common.errors import CaseError, ConfigError
from medfl.common.site import Cache

Make = Callable[..., Dataset]
Write = Callable[[Dataset, Path], Path]
Telling = Callable[..., set[str]]
Leaks = Callable[[set[str], bytes], set[str]]

STUDY = """
name = "chests"
[task]
kind = "classification"
classes = ["no", "yes"]
[image]
dimensions = 2
size = [32, 32]
[model]
name = "cnn"
[training]
local_steps = 1
[federation]
rounds = 1
[quality]
max_quarantined = 0.9
"""


@pytest.fixture
def hospital(planted: Make, write: Write, tmp_path: Path) -> Path:
    """Six images of six patients in folders with their names; two images cannot be used."""
    rows = ["number,label"]
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 4095, (64, 64), dtype="<u2")
        image = planted(
            instance=f"1.2.826.1.4711.{number}", PatientID=f"HOSP-77881{number}",
            PatientName=f"Quillfeather^Ottoline{number}", Rows=64, Columns=64,
            PixelData=pixels.tobytes(),
        )  # fmt: skip
        write(image, tmp_path / "data" / f"Quillfeather_{number}" / "CT.dcm")
        rows.append(f"HOSP-77881{number},{('no', 'yes')[number % 2]}")
    cut = (tmp_path / "data" / "Quillfeather_5" / "CT.dcm").read_bytes()
    (tmp_path / "data" / "Quillfeather_5" / "CT.dcm").write_bytes(cut[:-900])
    colour = planted(instance="1.2.826.1.4711.8", PatientID="HOSP-778818", NumberOfFrames="2",
                     PixelData=bytes(48))  # fmt: skip
    write(colour, tmp_path / "data" / "Quillfeather_8.dcm")
    rows.append("HOSP-778818,no")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "site.toml").write_text(
        'name = "site-a"\n[data]\nformat = "dicom"\npath = "data"\ntable = "labels.csv"\n'
        '[data.columns]\npatient = "number"\n[policy]\nsmallest_count = 1\n'
    )
    return tmp_path


def check(folder: Path, *more: str) -> int:
    return main(["check", str(folder / "site.toml"), "--study", str(folder / "study.toml"), *more])


def test_no_original_value_is_in_cache_page_or_json(
    hospital: Path,
    planted: Make,
    telling_of: Telling,
    leaks: Leaks,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        assert check(hospital, "--json", "--html", str(hospital / "check.html")) == 0
    plain = capsys.readouterr().out
    telling = telling_of(planted()) | {
        "Quillfeather",
        "HOSP-77881",
        "Ottoline",
        "1.2.826",
        "CT.dcm",
    }
    assert leaks(telling, plain.encode()) == set()
    assert leaks(telling, (hospital / "check.html").read_bytes()) == set()
    kept = [p for p in (hospital / ".medfl-cache").rglob("*") if p.is_file()]
    assert {p.name for p in kept} >= {"index.json", "inputs.bin", "fingerprints.json"}
    for path in kept:
        assert leaks(telling, path.read_bytes()) == set()
        assert leaks(telling, str(path.relative_to(hospital)).encode()) == set()


def test_the_cache_does_not_quote_a_broken_files_name(
    tmp_path: Path, leaks: Leaks, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for number in range(3):
            volume = np.random.default_rng(number).integers(0, 2, (8, 8, 8)).astype(np.uint8)
            place = tmp_path / "data" / part / f"Smith_{number}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), place)
        (tmp_path / "data" / part / "Jones.nii.gz").write_bytes(b"broken")
    study = STUDY.replace("classification", "segmentation").replace("cnn", "unet")
    study = study.replace("dimensions = 2", "dimensions = 3").replace("[32, 32]", "[8, 8, 8]")
    (tmp_path / "study.toml").write_text(study)
    site = 'name = "a"\n[data]\nformat = "decathlon"\npath = "data"\n'
    site += "[policy]\nsmallest_count = 1\n"
    (tmp_path / "site.toml").write_text(site)
    assert check(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["left_out"][0]["reason"] == "unreadable"
    for path in (tmp_path / ".medfl-cache").rglob("*"):
        if path.is_file():
            assert leaks({"Jones", "Smith", str(tmp_path)}, path.read_bytes()) == set()


def test_the_cache_does_not_quote_what_a_reader_says_of_a_file(
    tmp_path: Path, leaks: Leaks
) -> None:
    outcome = CaseError("unreadable", "ValueError: 'Quillfeather^Ottoline' in Jones.dcm")
    stored = build_entry(Cache(path=tmp_path), "entry", [outcome])
    assert stored.entries[0].reason == "unreadable"
    for path in tmp_path.rglob("*.*"):
        assert leaks({"Quillfeather", "Jones"}, path.read_bytes()) == set()


def test_the_names_of_cases_depend_on_the_sites_key_and_not_on_its_name(hospital: Path) -> None:
    pages = []
    for _ in range(2):
        assert check(hospital, "--html", str(hospital / "check.html")) == 0
        pages.append((hospital / "check.html").read_text())
        (hospital / ".medfl-deid.key").unlink()
    assert pages[0] != pages[1]


def counted(hospital: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Usable cases, and those left out by reason."""
    capsys.readouterr()
    check(hospital, "--json")
    plain = json.loads(capsys.readouterr().out)
    reasons = {item["reason"]: item["cases"] for item in plain["left_out"]}
    return {"usable": plain["usable"]} | reasons


def test_a_patient_who_withdraws_is_left_out_and_may_come_back(
    hospital: Path, capsys: pytest.CaptureFixture[str], leaks: Leaks
) -> None:
    before = counted(hospital, capsys)
    assert "withdrawn" not in before
    argv = ["exclude", str(hospital / "site.toml"), "HOSP-778812"]
    assert main(argv) == 0
    assert main(argv) == 0
    assert counted(hospital, capsys) == before | {"usable": before["usable"] - 1, "withdrawn": 1}
    kept = hospital / ".medfl-withdrawn"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert len(load_withdrawn(kept)) == 1
    assert leaks({"HOSP-778812", "778812"}, kept.read_bytes()) == set()
    assert main([*argv, "--undo"]) == 0
    assert counted(hospital, capsys) == before


def test_a_patient_who_withdraws_is_not_copied_either(
    hospital: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = str(hospital / "site.toml")
    assert main(["exclude", site, "HOSP-778812"]) == 0
    capsys.readouterr()
    argv = ["deid", str(hospital / "data"), str(hospital / "out"), "--site", site, "--json"]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["skipped"]["withdrawn"] == 1
    assert printed["patients"] == 5


def test_a_damaged_list_stops_everything(
    hospital: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hospital / ".medfl-withdrawn").write_text("HOSP-778812\n")
    assert check(hospital) == ConfigError.exit_code
    assert "withdrawn patients is damaged" in capsys.readouterr().err
