"""A series is one whole acquisition: nothing interleaved, nothing missing, nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from medfl.client.readers import dicom, dicom_worker
from medfl.client.readers.dicom_broken import Broken, series_without_slices
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import Study

Make = Callable[..., Dataset]
Save = Callable[[Dataset, Path], Path]


def series(
    folder: Path, make: Make, save: Save, uid: str = "1.2.3", count: int = 4, **lists: Any
) -> None:
    """Slices 5 mm apart; slice k is filled with k (and one brighter pixel), `lists` one a slice."""
    for k in range(count):
        pixels = np.full((3, 4), k, dtype=np.int16)
        pixels[0, 0] = 100
        more = {name: values[k] for name, values in lists.items()}
        ds = make(pixels, position=(0.0, 0.0, 5.0 * k), series=uid, InstanceNumber=k + 1, **more)
        save(ds, folder / f"IM{k:04}")


def found(folder: Path, study: Study) -> tuple[list[Any], list[tuple[str, str]]]:
    listed = dicom.find(DataSource(format="dicom", path=folder), study)
    return list(listed.cases), [(q.case_id, q.reason) for q in listed.quarantined]


def outcome(folder: Path, study: Study) -> str | tuple[int, ...]:
    """The shape of the only series, or why it cannot be used."""
    cases, aside = found(folder, study)
    if not cases:
        return aside[0][1]
    try:
        return dicom.load(cases[0], study).array.shape
    except CaseError as error:
        return error.reason


WHOLE = (1, 4, 3, 4)
TURNS = "several_acquisitions"


@pytest.mark.parametrize(
    ("name", "values", "seen"),
    [
        ("AcquisitionNumber", (1, 2, 1, 2), TURNS),
        # Two step-and-shoot scans, half a step apart, count on.
        ("AcquisitionNumber", (1, 11, 2, 12), TURNS),
        ("AcquisitionNumber", (1, 2, 3, 4), WHOLE),
        ("AcquisitionNumber", (4, 4, 3, 3), WHOLE),
        ("AcquisitionNumber", (1, 1, 1, 1), WHOLE),
        ("AcquisitionTime", ("120000", "120500", "120001", "120501"), TURNS),
        ("AcquisitionTime", ("120000", "120001", "120001", "120003"), WHOLE),
        ("ConvolutionKernel", ("B30", "B70", "B30", "B70"), TURNS),
        ("IrradiationEventUID", ("1.1", "1.2", "1.1", "1.2"), TURNS),
        ("IrradiationEventUID", ("1.1", "1.1", "1.2", "1.2"), WHOLE),
    ],
)
def test_interleaved_acquisitions_are_left_out_and_steps_of_one_are_used(
    tmp_path: Path,
    dicom_slice: Make,
    save: Save,
    volumes: Study,
    name: str,
    values: Sequence[Any],
    seen: object,
) -> None:
    series(tmp_path, dicom_slice, save, **{name: values})
    assert outcome(tmp_path, volumes) == seen


def test_slices_of_mr_may_have_been_excited_in_turns(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    times = ("120000", "120500", "120001", "120501")
    series(tmp_path, dicom_slice, save, AcquisitionTime=times, Modality=("MR",) * 4)
    assert outcome(tmp_path, volumes) == WHOLE


@pytest.mark.parametrize("slice_", [0, 3])
@pytest.mark.parametrize("kept", [0, 40, 300, -10])
def test_a_series_without_its_first_or_last_slice_is_left_out_and_counts_once(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study, slice_: int, kept: int
) -> None:
    series(tmp_path / "a", dicom_slice, save)
    series(tmp_path / "b", dicom_slice, save, uid="1.2.4")
    file = tmp_path / "a" / f"IM{slice_:04}"
    # Emptied, cut in the preamble, in the header, in the pixels.
    file.write_bytes(file.read_bytes()[:kept])
    cases, aside = found(tmp_path, volumes)
    assert [case.case_id for case in cases] == ["1.2.4"]
    assert [name for name, _ in aside] == ["1.2.3"]


def test_in_one_folder_a_broken_file_costs_the_series_of_its_neighbours() -> None:
    def item(name: str, uid: str) -> tuple[Path, dict[str, Any]]:
        return Path("all") / name, {"series": uid}

    images = [item(f"IM{k}", "A") for k in (1, 2, 3)] + [item(f"IM{k}", "B") for k in (10, 11)]

    def lost(name: str, reason: str = "dicom_truncated", uid: str = "") -> list[str]:
        return sorted(series_without_slices([Broken(Path("all") / name, reason, "", uid)], images))

    # 9 lies between 3 and 10 as people count: it may have been the end of A or the start of B.
    assert lost("IM9") == ["A", "B"]
    assert lost("IM12") == ["B"]
    assert lost("IM12", uid="A") == ["A"]
    assert lost("IM9", uid="C") == []
    assert lost("IM0", "not_dicom") == ["A"]
    assert lost("viewer.exe", "not_dicom") == []
    assert lost("IM9", "not_an_image") == []


def test_an_image_exported_again_in_another_syntax_is_a_copy(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    series(tmp_path / "a", dicom_slice, save)
    again = dcmread(tmp_path / "a" / "IM0002")
    again.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    (tmp_path / "again").mkdir()
    again.save_as(tmp_path / "again" / "x", implicit_vr=True, little_endian=True)
    cases, aside = found(tmp_path, volumes)
    assert [len(case.files) for case in cases] == [4]
    assert aside == [("1.2.3", "duplicate")]

    again.PixelData = bytes(len(again.PixelData))
    again.save_as(tmp_path / "again" / "x", implicit_vr=True, little_endian=True)
    assert "uid_conflict" in [reason for _, reason in found(tmp_path, volumes)[1]]


def test_a_reused_uid_costs_the_series_that_have_it_and_no_other(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    """As it was: the whole hospital, and in 3-D the rest of the series would have passed."""
    for uid in ("1.2.3", "1.2.4", "1.2.5"):
        series(tmp_path / uid, dicom_slice, save, uid=uid)
    name = dcmread(tmp_path / "1.2.3" / "IM0003").SOPInstanceUID
    last = dcmread(tmp_path / "1.2.4" / "IM0003")
    last.SOPInstanceUID = last.file_meta.MediaStorageSOPInstanceUID = name
    last.PixelData = bytes(len(last.PixelData))
    last.save_as(tmp_path / "1.2.4" / "IM0003")
    cases, aside = found(tmp_path, volumes)
    assert [(case.case_id, len(case.files)) for case in cases] == [("1.2.5", 4)]
    assert aside == [("1.2.3", "uid_conflict"), ("1.2.4", "uid_conflict")]


def test_what_no_reader_thought_of_costs_one_file_and_is_not_told_as_memory(
    tmp_path: Path, dicom_slice: Make, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path, dicom_slice, save, count=2)
    whole = dicom_worker._header

    def spoiled(path: Path) -> dict[str, Any]:
        if path.name == "IM0001":
            raise ZeroDivisionError("with a patient's name")
        return whole(path)

    monkeypatch.setattr(dicom_worker, "_header", spoiled)
    files = [str(tmp_path / f"IM000{k}") for k in (0, 1)]
    good, bad = dicom_worker.headers({"files": files})[0]["headers"]
    assert good["instance"]
    assert bad["reason"] == "reading_failed"
    assert bad["detail"].startswith("ZeroDivisionError in test_dicom_whole.py, line ")
    assert bad["series"] == "1.2.3"


def test_a_slice_that_lies_twice_in_its_series_under_two_uids_counts_once(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    series(tmp_path, dicom_slice, save)
    again = dcmread(tmp_path / "IM0002")
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    save(again, tmp_path / "IM9999")
    assert outcome(tmp_path, volumes) == WHOLE
    again.PixelData = bytes(len(again.PixelData))
    save(again, tmp_path / "IM9999")
    assert outcome(tmp_path, volumes) == "several_volumes"


def test_files_of_other_programs_beside_the_images_count_against_nobody(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    from medfl.client.data.reasons import NOT_FAULTY

    series(tmp_path / "DICOM" / "0001", dicom_slice, save)
    names = ("VIEWER/viewer.exe", "VIEWER/qt5.dll", "THUMBS/0001.jpg", "run.sh", "CRC.crc")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"MZ\0\0 no image" * 20)
    (tmp_path / "lost").write_bytes(b"no image")
    cases, aside = found(tmp_path, volumes)
    assert [len(case.files) for case in cases] == [4]
    assert sorted(name for name, reason in aside if reason in NOT_FAULTY) == sorted(names)
    # A file without an ending may have been a slice.
    assert [pair for pair in aside if pair[1] not in NOT_FAULTY] == [("lost", "not_dicom")]


@pytest.mark.parametrize(
    ("frames", "seen"),
    [(("1.9", "1.9", "1.8", "1.8"), "mixed_geometry"), (("1.9", "", "1.9", ""), WHOLE)],
)
def test_slices_of_two_frames_of_reference_are_no_volume(
    tmp_path: Path,
    dicom_slice: Make,
    save: Save,
    volumes: Study,
    frames: Sequence[str],
    seen: object,
) -> None:
    series(tmp_path, dicom_slice, save, FrameOfReferenceUID=frames)
    assert outcome(tmp_path, volumes) == seen
