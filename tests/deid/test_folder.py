"""`medfl-client deid`: the same folder gives the same copies, and the originals stay untouched."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pydicom.data
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from medfl.client.cli import main
from medfl.client.data.reasons import REASONS
from medfl.client.deid.folder import SUMMARY, deidentify_folder
from medfl.client.deid.treat import BAD_VALUE
from medfl.client.readers import READERS
from medfl.client.readers.dicom_places import frame_places
from medfl.client.readers.dicom_values import frames
from medfl.common.errors import CaseError, ConfigError, DataError
from medfl.common.site import Deid
from medfl.common.source import DataSource
from medfl.common.study import Federation, ImageInput, Model, Study, Task, Training

Make = Callable[..., Dataset]
Write = Callable[[Dataset, Path], Path]
Telling = Callable[..., set[str]]
Leaks = Callable[[set[str], bytes], set[str]]


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pydicom_files() -> list[Path]:
    folder = Path(pydicom.data.__file__).parent / "test_files"
    if not folder.is_dir():
        pytest.skip("this pydicom carries no test files")
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def source(planted: Make, write: Write, tmp_path: Path) -> Path:
    """Two images, a copy, and one of each kind that must not be passed on."""
    folder = tmp_path / "Quillfeather Ottoline"
    write(planted(), folder / "one" / "Quillfeather.dcm")
    write(planted(), folder / "copy.dcm")
    write(planted(instance="1.2.826.1.4711.4"), folder / "two")
    write(planted(instance="1.2.826.1.4711.5", BurnedInAnnotation="YES"), folder / "screen_7.dcm")
    write(planted(instance="1.2.826.1.4711.6", Modality="US"), folder / "us.dcm")
    write(planted(instance="1.2.826.1.4711.4", PatientID="other"), folder / "zz_conflict.dcm")
    (folder / "notes.txt").write_text("about Quillfeather")
    whole = (folder / "two").read_bytes()
    (folder / "cut.dcm").write_bytes(whole[: len(whole) // 2])
    (folder / "link.dcm").symlink_to(folder / "two")
    return folder


def test_copies_are_written_and_the_rest_is_counted_by_reason(
    source: Path, tmp_path: Path, secret: bytes
) -> None:
    before = contents(source)
    summary = deidentify_folder(source, tmp_path / "out", Deid(), secret)
    assert (summary.written, summary.copies, summary.patients, summary.series) == (2, 1, 1, 1)
    assert summary.skipped == {
        "burned_in": 1,
        "burned_in_unknown": 1,
        "dicom_truncated": 1,
        "not_a_plain_file": 1,
        "not_dicom": 1,
        "uid_conflict": 1,
    }
    assert set(summary.skipped) <= set(REASONS)
    assert contents(source) == before
    assert len(contents(tmp_path / "out")) == summary.written + 1


def test_no_name_of_the_originals_is_in_any_copy_name_or_summary(
    source: Path, tmp_path: Path, secret: bytes, telling_of: Telling, leaks: Leaks
) -> None:
    out = tmp_path / "out"
    deidentify_folder(source, out, Deid(), secret)
    telling = {"Quillfeather", "zz_conflict", "link.dcm"}
    for path in source.rglob("*"):
        if path.is_file() and path.suffix != ".txt" and path.name != "cut.dcm":
            telling |= telling_of(dcmread(path, force=True), path)
    telling.discard("copy")
    for path in sorted(out.rglob("*")):
        assert leaks(telling, str(path.relative_to(out)).encode()) == set()
        if path.is_file():
            assert leaks(telling, path.read_bytes()) == set()


def test_the_same_folder_twice_gives_the_same_copies_and_another_key_gives_others(
    source: Path, tmp_path: Path, secret: bytes
) -> None:
    deidentify_folder(source, tmp_path / "a", Deid(), secret)
    deidentify_folder(source, tmp_path / "b", Deid(), secret)
    first = contents(tmp_path / "a")
    assert contents(tmp_path / "b") == first
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    deidentify_folder(source, tmp_path / "a", Deid(), secret)
    assert contents(tmp_path / "a") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == times
    deidentify_folder(source, tmp_path / "c", Deid(), bytes(32))
    assert not set(contents(tmp_path / "c")) & (set(first) - {SUMMARY})


def test_a_copy_of_a_copy_is_no_worse(source: Path, tmp_path: Path, secret: bytes) -> None:
    deidentify_folder(source, tmp_path / "a", Deid(), secret)
    again = deidentify_folder(tmp_path / "a", tmp_path / "b", Deid(), secret)
    assert again.written == 2


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_copies_never_lie_among_the_originals(source: Path, place: str, secret: bytes) -> None:
    with pytest.raises(ConfigError, match="originals"):
        deidentify_folder(source, source / place, Deid(), secret)


def test_a_link_to_the_originals_is_recognised(source: Path, tmp_path: Path, secret: bytes) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ConfigError, match="originals"):
        deidentify_folder(source, tmp_path / "link" / "out", Deid(), secret)


def test_a_folder_with_other_files_is_not_written_to(
    source: Path, tmp_path: Path, secret: bytes
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        deidentify_folder(source, tmp_path / "full", Deid(), secret)


def test_a_folder_without_images_is_an_error(tmp_path: Path, secret: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(b"no")
    with pytest.raises(DataError, match="1 not_dicom"):
        deidentify_folder(tmp_path / "in", tmp_path / "out", Deid(), secret)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_prints_counts_and_keeps_its_key(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        'name = "brannock"\n[data]\nformat = "dicom"\npath = "."\n'
        "[deid]\nretain_patient_characteristics = true\n"
    )
    argv = ["deid", str(source), str(tmp_path / "out"), "--site", str(site), "--json"]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["written"] == 2
    assert "Quillfeather" not in json.dumps(printed)
    key = tmp_path / ".medfl-deid.key"
    assert key.stat().st_mode & 0o777 == 0o600
    written = contents(tmp_path / "out")
    assert main(argv) == 0
    assert contents(tmp_path / "out") == written
    path = next((tmp_path / "out").rglob("*.dcm"))
    assert dcmread(path).PatientAge == "090Y"
    assert path.stat().st_mode & 0o077 == 0
    capsys.readouterr()
    key.chmod(0o640)
    assert main(argv) == ConfigError.exit_code
    assert "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "xyz", "00" * 8])
def test_a_damaged_key_is_refused_and_never_replaced(
    source: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.toml"
    site.write_text('name = "a"\n[data]\nformat = "dicom"\npath = "."\n[deid]\nkey = "k"\n')
    (tmp_path / "k").write_text(content)
    (tmp_path / "k").chmod(0o600)
    argv = ["deid", str(source), str(tmp_path / "out"), "--site", str(site)]
    assert main(argv) == ConfigError.exit_code
    assert (tmp_path / "k").read_text() == content


def test_an_unknown_option_of_the_site_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        'name = "a"\n[data]\nformat = "dicom"\npath = "."\n[deid]\nretain_dates = true\n'
    )
    assert main(["deid", str(source), str(tmp_path / "out"), "--site", str(site)]) == 2
    assert "deid.retain_dates" in capsys.readouterr().err


def test_nothing_of_pydicoms_files_comes_out(
    tmp_path: Path, secret: bytes, telling_of: Telling, leaks: Leaks
) -> None:
    """Compressed, big-endian, nested, broken, overlaid, with private blocks and odd characters."""
    (tmp_path / "in").mkdir()
    known: dict[str, set[str]] = {}
    for number, path in enumerate(pydicom_files()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dataset = dcmread(path)
                dataset.SOPInstanceUID = f"1.2.826.0.1.9999.{number}"
                dataset.BurnedInAnnotation = "NO"
                dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
                dataset.save_as(tmp_path / "in" / f"{number:03}.dcm")
                known[str(number)] = telling_of(dataset, path)
            except (*BAD_VALUE, InvalidDicomError):
                continue
    summary = deidentify_folder(tmp_path / "in", tmp_path / "out", Deid(), secret)
    assert summary.written >= 30
    assert set(summary.skipped) <= set(REASONS)
    every = set().union(*known.values())
    assert len(every) > 400
    for path in (tmp_path / "out").rglob("*.dcm"):
        # A value of one file may be a technical one of another: only long ones count throughout.
        found = leaks({t for t in every if len(t) >= 8}, path.read_bytes())
        allowed = technical_texts(path)
        assert {f for f in found if not any(f in text for text in allowed)} == set()


@pytest.mark.slow
def test_the_pictures_of_pydicoms_files_stay_as_they_are(
    tmp_path: Path, deidentify: Callable[..., Dataset]
) -> None:
    compared = 0
    for path in pydicom_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dataset = dcmread(path)
                dataset.BurnedInAnnotation = "NO"
                dataset.save_as(tmp_path / "a.dcm")
                before = frames(dcmread(tmp_path / "a.dcm"))
                copy = deidentify(tmp_path / "a.dcm")
            except (*BAD_VALUE, InvalidDicomError, CaseError, RuntimeError):
                # What nobody can decode, or what is not passed on.
                continue
            assert np.array_equal(frames(copy), before, equal_nan=True), path.name
            assert frame_places(copy) == frame_places(dataset)
            compared += 1
    assert compared >= 30


def technical_texts(path: Path) -> list[str]:
    """What a copy says in attributes that it may keep."""
    from medfl.client.deid import table

    dataset = dcmread(path)
    return [str(e.value) for e in dataset.iterall() if e.VR != "SQ" and e.keyword in table.kept()]


def pictures(dimensions: Literal[2, 3]) -> Study:
    return Study(
        name="test",
        task=Task(kind="classification", classes=["no", "yes"]),
        model=Model(name="any"),
        training=Training(local_steps=1),
        federation=Federation(rounds=1),
        image=ImageInput(dimensions=dimensions, size=[8] * dimensions, intensity="none"),
    )


@pytest.mark.slow
def test_nothing_of_two_scanners_series_comes_out_and_their_volumes_stay(
    public_data: Callable[[str], Path],
    tmp_path: Path,
    secret: bytes,
    telling_of: Telling,
    leaks: Leaks,
) -> None:
    source, out = public_data("dicom_mr_two_vendors"), tmp_path / "out"
    summary = deidentify_folder(source, out, Deid(), secret)
    originals = sorted(source.rglob("*.dcm"))
    assert summary.written == len(originals)
    telling: set[str] = set()
    for path in originals:
        telling |= telling_of(dcmread(path), path)
    assert len(telling) > 1000
    for path in out.rglob("*.dcm"):
        assert leaks(telling, path.read_bytes()) == set()
    assert leaks(telling, (out / SUMMARY).read_bytes()) == set()

    reader, study = READERS["dicom"], pictures(dimensions=2)
    before = reader.find(DataSource(format="dicom", path=source), study).cases
    after = reader.find(DataSource(format="dicom", path=out), study).cases
    pixels = {reader.load(c, study).array.tobytes() for c in before[::10] if not c.fields["mosaic"]}
    assert len(pixels) > 10
    assert pixels <= {
        reader.load(c, study).array.tobytes() for c in after if not c.fields["mosaic"]
    }


def test_a_series_is_the_same_volume_at_the_same_place(
    planted: Make, write: Write, tmp_path: Path, secret: bytes
) -> None:
    for number in range(5):
        pixels = np.full((3, 4), 10 * number, "<u2").tobytes()
        place = [10.0, -20.5, 7.5 + 2.5 * number]
        slice_ = planted(
            instance=f"1.2.3.{number}", ImagePositionPatient=place, PixelData=pixels,
            RescaleSlope="2", RescaleIntercept="-1024",
        )  # fmt: skip
        write(slice_, tmp_path / "in" / f"{9 - number}.dcm")
    deidentify_folder(tmp_path / "in", tmp_path / "out", Deid(), secret)
    reader, study = READERS["dicom"], pictures(dimensions=3)
    (before,) = reader.find(DataSource(format="dicom", path=tmp_path / "in"), study).cases
    (after,) = reader.find(DataSource(format="dicom", path=tmp_path / "out"), study).cases
    one, two = reader.load(before, study), reader.load(after, study)
    assert one.array.shape == (1, 4, 3, 5)
    assert np.array_equal(one.array, two.array)
    assert one.affine is not None
    assert np.array_equal(one.affine, two.affine)


def test_hostile_files_are_counted_and_nothing_breaks(
    planted: Make, write: Write, tmp_path: Path, secret: bytes
) -> None:
    folder = tmp_path / "in"
    good = write(planted(), folder / "good.dcm").read_bytes()
    rng = np.random.default_rng(0)
    for number in range(40):
        broken = bytearray(good)
        for place in rng.integers(132, len(good), 6):
            broken[place] = int(rng.integers(256))
        (folder / f"{number}.dcm").write_bytes(broken)
    (folder / "program.dcm").write_bytes(b"MZ" + good[2:])
    (folder / "empty.dcm").write_bytes(b"")
    os.mkfifo(folder / "pipe.dcm")
    summary = deidentify_folder(folder, tmp_path / "out", Deid(), secret)
    assert summary.written >= 1
    counted = summary.written + summary.copies + sum(summary.skipped.values())
    assert counted == len(list(folder.iterdir()))
    assert summary.skipped["dicom_preamble"] == 1
    assert set(summary.skipped) <= set(REASONS)
    for path in (tmp_path / "out").rglob("*"):
        assert path.resolve().is_relative_to((tmp_path / "out").resolve())
