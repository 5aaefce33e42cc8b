"""`medfl-client check` tells a hospital what its data are worth, and tells nobody else anything."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from medfl.client.cli import main
from medfl.client.data.check import check
from medfl.client.data.check_page import COLOURS, pictures
from medfl.client.data.reasons import REASONS
from medfl.common.site import load_site
from medfl.common.study import load_study

STUDY = """
name = "nodules"
[task]
kind = "segmentation"
classes = ["background", "nodule"]
[image]
dimensions = 3
size = [8, 8, 8]
[model]
name = "unet"
[training]
local_steps = 1
[federation]
rounds = 1
[quality]
max_quarantined = 0.5
"""


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """A folder with site.toml, study.toml, six good volumes and one without a readable header."""
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for i in range(6):
        volume = np.random.default_rng(i).normal(size=(8, 8, 8)).astype(np.float32)
        mask = np.zeros((8, 8, 8), dtype=np.uint8)
        mask[2:5, 2:5, 2:5] = 1
        for part, array in (("imagesTr", volume), ("labelsTr", mask)):
            place = tmp_path / "data" / part / f"Smith_{i}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 2.5, 1])), place)
    (tmp_path / "data" / "imagesTr" / "Jones.nii.gz").write_bytes(b"broken")
    site = 'name = "st-marys"\n[data]\nformat = "decathlon"\npath = "data"\n'
    (tmp_path / "site.toml").write_text(site)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def command(hospital: Path, *more: str) -> list[str]:
    return ["check", str(hospital / "site.toml"), "--study", str(hospital / "study.toml"), *more]


def test_the_check_counts_what_is_there(hospital: Path) -> None:
    result = check(load_site(hospital / "site.toml"), load_study(hospital / "study.toml"))
    assert result.usable == 6
    assert sum(result.cases.values()) == sum(result.patients.values()) == 6
    assert [(item.reason, item.cases, item.faulty) for item in result.left_out] == [
        ("unreadable", 1, True)
    ]
    # A mask has 27 voxels of nodule.
    assert sum(part["nodule"] for part in result.classes.values()) == 6 * 27
    assert result.pictures is not None
    assert [r.median for r in result.pictures.spacing_mm] == [1.0, 1.0, 2.5]
    assert [r.high for r in result.pictures.sizes] == [8, 8, 8]
    assert re.fullmatch("[0-9a-f]{64}", result.digest)
    assert result.exit_code == 0


def test_json_goes_to_stdout_and_names_nobody(
    hospital: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(hospital, "--json")) == 0
    out = capsys.readouterr().out
    plain = json.loads(out)
    assert plain["usable"] == 6
    assert plain["left_out"][0]["reason"] == "unreadable"
    assert "Smith" not in out
    assert "Jones" not in out


def test_the_text_says_what_to_do(hospital: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(hospital)) == 0
    captured = capsys.readouterr()
    assert "6 usable cases" in captured.out
    assert "Export it again" in captured.out
    assert "every file stays as it is" in captured.out
    assert "Smith" not in captured.out + captured.err


def test_too_much_bad_data_is_exit_code_3_and_has_no_digest(
    hospital: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = hospital / "study.toml"
    study.write_text(STUDY.replace("0.5", "0.1"))
    assert main(command(hospital, "--json")) == 3
    plain = json.loads(capsys.readouterr().out)
    assert plain["digest"] == ""
    assert "1 of 7 cases" in plain["faults"][0]


def test_each_reason_is_told_once_however_much_it_stops(
    hospital: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too many left out, and too few left: two faults, and one list of reasons."""
    study = hospital / "study.toml"
    study.write_text(STUDY.replace("0.5", "0.1") + "min_cases = 50\n")
    assert main(command(hospital)) == 3
    out = capsys.readouterr().out
    assert out.count("Cannot take part: ") == 2
    # The one volume whose header nobody can read.
    assert out.count(REASONS["unreadable"]) == 1


def test_the_hospitals_policy_wins(hospital: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (hospital / "site.toml").open("a") as file:
        file.write('[policy]\nmin_cases = 100\ntasks = ["risk"]\n')
    assert main(command(hospital)) == 5
    out = capsys.readouterr().out
    assert "policy.tasks of this site does not have 'segmentation'" in out
    assert "policy asks for at least 100" in out


def test_faults_in_files_are_exit_code_2(
    hospital: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hospital / "study.toml").write_text(STUDY.replace("[task]", "[tusk]"))
    assert main(command(hospital)) == 2
    assert "tusk" in capsys.readouterr().err


def test_absent_data_are_exit_code_3(hospital: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hospital / "data").rename(hospital / "elsewhere")
    assert main(command(hospital)) == 3
    assert "site.toml" in capsys.readouterr().err


def test_the_page_stands_alone_and_names_nobody(hospital: Path) -> None:
    page = hospital / "check.html"
    assert main(command(hospital, "--html", str(page))) == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 6
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http://" not in text
    assert "https://" not in text
    assert "Smith" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.stat().st_mode & 0o077 == 0


def test_the_page_escapes_what_hospitals_write(hospital: Path) -> None:
    study = hospital / "study.toml"
    study.write_text(STUDY.replace('"nodule"', '"<script>"'))
    page = hospital / "check.html"
    assert main(command(hospital, "--html", str(page))) == 0
    assert "<script>" not in page.read_text()


def test_the_list_of_left_out_cases_is_for_the_hospital_only(hospital: Path) -> None:
    path = hospital / "left.csv"
    for _ in range(2):  # the second time from the cache, which keeps no detail
        assert main(command(hospital, "--left-out", str(path))) == 0
        lines = path.read_text().splitlines()
        assert lines[0] == "case,reason,detail,step"
        assert lines[1].startswith("Jones,unreadable,")
        assert lines[1].endswith(",listing")
        assert path.stat().st_mode & 0o077 == 0


def test_a_picture_left_out_while_it_was_read_has_its_detail_also_from_the_cache(
    tmp_path: Path,
) -> None:
    """As it was: the reason alone, since the cache holds no detail."""
    (tmp_path / "pictures").mkdir()
    draw = np.random.default_rng(1)
    names = [f"{i}.png" for i in range(8)]
    for name in names:
        pixels = draw.integers(0, 255, (9, 9)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / name)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "pictures" / "1.png")
    content = (tmp_path / "pictures" / "2.png").read_bytes()
    (tmp_path / "pictures" / "2.png").write_bytes(content[:60])
    rows = [f"{n},{'yes' if i % 2 else 'no'}" for i, n in enumerate(names)]
    rows[4] = "4.png,perhaps"
    (tmp_path / "t.csv").write_text("\n".join(["image,label", *rows]))
    (tmp_path / "site.toml").write_text(
        'name = "n"\n[data]\nformat = "image"\npath = "pictures"\ntable = "t.csv"\n'
    )
    (tmp_path / "study.toml").write_text(
        'name = "s"\n[task]\nkind = "classification"\nclasses = ["no", "yes"]\n'
        '[image]\ndimensions = 2\nsize = [9, 9]\n[model]\nname = "cnn"\n'
        "[training]\nlocal_steps = 1\n[federation]\nrounds = 1\n"
        "[quality]\nmax_quarantined = 0.9\n"
    )
    where = tmp_path / "left.csv"
    told = []
    for _ in range(2):
        main(
            [
                *("check", str(tmp_path / "site.toml"), "--study", str(tmp_path / "study.toml")),
                *("--left-out", str(where)),
            ]
        )
        rows_told = csv.DictReader(where.read_text().splitlines())
        told.append({row["case"]: row for row in rows_told})
    assert told[0] == told[1]
    steps = {name: (row["reason"], row["step"]) for name, row in told[0].items()}
    assert steps["2.png"] == ("unreadable", "reading")
    assert steps["4.png"] == ("label_unknown", "matching")
    assert told[0]["2.png"]["detail"]
    assert "perhaps" in told[0]["4.png"]["detail"]


def test_a_page_that_cannot_be_written_is_exit_code_7(hospital: Path) -> None:
    assert main(command(hospital, "--html", str(hospital / "no" / "where.html"))) == 7


def test_check_changes_no_file_of_the_hospital(hospital: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in hospital.rglob("*.nii.gz")}
    main(command(hospital))
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in hospital.rglob("*.nii.gz")} == before


def test_records_are_counted_by_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("id,age,y\n1,40,no\n2,?,yes\n3,400,yes\n4,50,no\n")
    (tmp_path / "site.toml").write_text(
        'name = "a"\n[data]\nformat = "table"\npath = "t.csv"\n'
        '[data.columns]\ncase = "id"\nlabel = "y"\n[policy]\nsmallest_count = 1\n'
    )
    (tmp_path / "study.toml").write_text(
        'name = "r"\n[task]\nkind = "risk"\nclasses = ["no", "yes"]\n'
        '[record]\n[[record.features]]\nname = "age"\nrange = [0, 120]\n'
        '[model]\nname = "logistic"\n[training]\nlocal_steps = 1\n[federation]\nrounds = 1\n'
        "[quality]\nmax_quarantined = 0.5\n"
    )
    assert main(command(tmp_path, "--json")) == 0
    plain = json.loads(capsys.readouterr().out)
    [age] = plain["features"]
    assert (age["records"], age["missing"], age["implausible"]) == (4, 1, 1)
    assert (age["low"], age["median"], age["high"]) == (40, 50, 400)
    assert [i["reason"] for i in plain["left_out"]] == ["implausible", "incomplete_record"]


def test_one_class_only_is_allowed_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)
        (tmp_path / "data" / "yes").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "yes" / f"{i}.png")
    site = 'name = "a"\n[data]\nformat = "image"\npath = "data"\n[policy]\nsmallest_count = 1\n'
    (tmp_path / "site.toml").write_text(site)
    study = STUDY.replace("segmentation", "classification").replace("unet", "cnn")
    study = study.replace('"background", "nodule"', '"no", "yes"')
    study = study.replace("dimensions = 3\nsize = [8, 8, 8]", "dimensions = 2\nsize = [8, 8]")
    (tmp_path / "study.toml").write_text(study)
    assert main(command(tmp_path)) == 0
    assert "one class" in capsys.readouterr().out


def test_contours_surround_the_mask_in_its_colour() -> None:
    image = np.zeros((1, 300, 300), dtype=np.float32)
    image[0, 0, 0] = 1
    mask = np.zeros((300, 300), dtype=np.uint8)
    mask[10:20, 10:20] = 1
    drawn = (pictures(image, mask, None)[0][1] == COLOURS[0]).all(axis=2)
    # The outline of a 10 × 10 square.
    assert drawn.sum() == 36
    assert drawn[10, 10]
    assert not drawn[15, 15]


@pytest.mark.parametrize("more", [[], ["check"]])
def test_help_has_examples(more: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "medfl.client.cli", *more, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Example: medfl-client check" in run.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import medfl.client.cli; heavy = {'torch', 'numpy', 'pydicom', 'monai', "
        "'sklearn', 'nibabel', 'PIL'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_real_volumes_are_all_usable(
    public_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = public_data("msd_hippocampus")
    (tmp_path / "site.toml").write_text(
        f'name = "a"\n[data]\nformat = "decathlon"\npath = "{folder}"\n'
    )
    study = STUDY.replace('"background", "nodule"', '"background", "anterior", "posterior"')
    (tmp_path / "study.toml").write_text(study.replace("[8, 8, 8]", "[40, 56, 40]"))
    assert main(command(tmp_path, "--json")) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["usable"], plain["left_out"]) == (134, [])


def test_a_model_that_no_catalogue_has_is_told_before_any_case_is_read(
    hospital: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hospital / "study.toml").write_text(STUDY.replace('"unet"', '"uned"'))
    assert main(command(hospital)) == 2
    assert "study.toml: model.name: there is no model 'uned'" in capsys.readouterr().err
