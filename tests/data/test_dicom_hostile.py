"""Files that attack or mislead the reader are set aside with a reason, and nothing else happens."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medfl.client.data.reasons import REASONS
from medfl.client.readers import READERS, sandbox
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import Study

Make = Callable[..., Dataset]
Save = Callable[[Dataset, Path], Path]


def reasons(folder: Path, study: Study) -> list[str]:
    found = READERS["dicom"].find(DataSource(format="dicom", path=folder), study)
    assert all(q.reason in REASONS for q in found.quarantined)
    return [q.reason for q in found.quarantined] + ["usable"] * len(found.cases)


@pytest.mark.parametrize("content", [b"", b"not an image at all", bytes(4096)])
def test_an_empty_file_or_a_text_is_set_aside(
    tmp_path: Path, planes: Study, content: bytes
) -> None:
    (tmp_path / "a.dcm").write_bytes(content)
    assert reasons(tmp_path, planes) == ["not_dicom"]


def test_what_archives_put_beside_images_is_passed_over(tmp_path: Path, planes: Study) -> None:
    for name in ("README", "notes.txt", ".DS_Store", "labels.csv"):
        (tmp_path / name).write_text("x")
    assert reasons(tmp_path, planes) == []


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99])
def test_a_file_cut_anywhere_is_set_aside(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study, share: float
) -> None:
    path = save(dicom_slice(), tmp_path / "a.dcm")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert reasons(tmp_path, planes)[0] in ("dicom_truncated", "unreadable")


@pytest.mark.parametrize(
    ("element", "value"),
    [("Rows", 65535), ("Columns", 65535), ("NumberOfFrames", 2_000_000_000), ("Rows", 0)],
)
def test_a_declared_size_that_is_not_there_is_set_aside(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study, element: str, value: int
) -> None:
    save(dicom_slice(**{element: value}), tmp_path / "a.dcm")
    assert reasons(tmp_path, planes)[0] in ("dicom_truncated", "dicom_pixels")


def test_more_pixels_than_declared_are_set_aside(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    ds = dicom_slice()
    ds.PixelData += ds.PixelData
    save(ds, tmp_path / "a.dcm")
    assert reasons(tmp_path, planes) == ["dicom_pixels"]


def deflated(make: Make, path: Path, filling: int) -> None:
    """A deflated file whose data set holds `filling` zero bytes in a private element."""
    ds = make()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    start = 144 + struct.unpack("<L", content[140:144])[0]
    body = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    extra = struct.pack("<HH2sHL", 0x7FE1, 0x1010, b"OB", 0, filling)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(body + extra)
    for _ in range(filling // 1_000_000):
        packed += packer.compress(bytes(1_000_000))
    path.write_bytes(content[:start] + packed + packer.flush())


def test_a_deflated_file_is_read_but_a_bomb_is_not(
    tmp_path: Path, dicom_slice: Make, planes: Study
) -> None:
    deflated(dicom_slice, tmp_path / "good.dcm", 1_000_000)
    assert reasons(tmp_path, planes) == ["usable"]
    deflated(dicom_slice, tmp_path / "bomb.dcm", 190_000_000)
    assert (tmp_path / "bomb.dcm").stat().st_size < 400_000
    assert reasons(tmp_path, planes) == ["dicom_deflated", "usable"]


@pytest.mark.parametrize("explicit_length", [False, True])
def test_sequences_nested_300_deep_are_set_aside(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study, explicit_length: bool
) -> None:
    path = save(dicom_slice(), tmp_path / "a.dcm")
    content = path.read_bytes()
    at = content.index(struct.pack("<HH", 0x0010, 0x0020))
    nested = b""
    tag = struct.pack("<HH2sH", 0x0008, 0x1140, b"SQ", 0)
    item, item_end = struct.pack("<HH", 0xFFFE, 0xE000), struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
    for _ in range(300):
        if explicit_length:
            inner = item + struct.pack("<L", len(nested)) + nested
            nested = tag + struct.pack("<L", len(inner)) + inner
        else:
            inner = item + struct.pack("<L", 0xFFFFFFFF) + nested + item_end
            end = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
            nested = tag + struct.pack("<L", 0xFFFFFFFF) + inner + end
    path.write_bytes(content[:at] + nested + content[at:])
    assert reasons(tmp_path, planes) == ["dicom_nesting"]


@pytest.mark.parametrize("start", [b"MZ\x90\x00", b"\x7fELF"])
def test_a_file_that_is_also_a_program_is_set_aside(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study, start: bytes
) -> None:
    path = save(dicom_slice(), tmp_path / "a.dcm")
    content = path.read_bytes()
    path.write_bytes(start + content[len(start) :])
    assert reasons(tmp_path, planes) == ["dicom_preamble"]


def test_links_and_devices_are_not_followed(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    outside = save(dicom_slice(), tmp_path / "outside" / "a.dcm")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.dcm").symlink_to(outside)
    (inside / "folder").symlink_to(outside.parent)
    os.mkfifo(inside / "pipe.dcm")
    assert reasons(inside, planes) == ["not_a_plain_file"] * 3


def test_a_dicomdir_that_points_outside_is_reported_and_not_followed(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    save(dicom_slice(), tmp_path / "secret.dcm")
    ds = dicom_slice()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    for name in ("PixelData", "Rows", "Columns"):
        delattr(ds, name)
    record = Dataset()
    with pytest.warns(UserWarning, match="Invalid value"):
        record.ReferencedFileID = ["..", "secret.dcm"]
    ds.DirectoryRecordSequence = [record]
    save(ds, tmp_path / "disc" / "DICOMDIR")
    assert reasons(tmp_path / "disc", planes) == ["path_outside"]


def test_a_table_cannot_lead_out_of_the_folder(tmp_path: Path, study: Callable[..., Study]) -> None:
    import nibabel

    volume = nibabel.Nifti1Image(np.ones((2, 2, 2), dtype=np.uint8), np.eye(4))
    nibabel.save(volume, tmp_path / "secret.nii.gz")
    (tmp_path / "in").mkdir()
    table = tmp_path / "t.csv"
    table.write_text(f"image,label\n../secret.nii.gz,yes\n{tmp_path}/secret.nii.gz,no\na\0b,no\n")
    source = DataSource(format="nifti", path=tmp_path / "in", table=table)
    found = READERS["nifti"].find(source, study())
    assert not found.cases
    assert {q.reason for q in found.quarantined} == {"path_outside"}


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"BurnedInAnnotation": "YES"}, "burned_in"),
        ({"Modality": "US"}, "burned_in_unknown"),
        ({"Modality": "XA", "BurnedInAnnotation": ""}, "burned_in_unknown"),
        ({"Modality": "US", "BurnedInAnnotation": "NO"}, "usable"),
        ({"Modality": "CT"}, "usable"),
    ],
)
def test_pictures_with_names_in_them_are_left_out(
    tmp_path: Path,
    dicom_slice: Make,
    save: Save,
    planes: Study,
    elements: dict[str, Any],
    expected: str,
) -> None:
    save(dicom_slice(**elements), tmp_path / "a.dcm")
    assert reasons(tmp_path, planes) == [expected]


def test_one_bad_file_takes_no_good_one_with_it(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        save(dicom_slice(), tmp_path / f"{i}.dcm")
    real = sandbox.ask

    def dies_on_the_second(request: dict[str, Any], timeout_s: float) -> sandbox.Answer:
        if any(name.endswith("1.dcm") for name in request["files"]):
            raise CaseError("dicom_worker")
        return real(request, timeout_s)

    monkeypatch.setattr(sandbox, "ask", dies_on_the_second)
    assert sorted(reasons(tmp_path, planes)) == ["dicom_worker", "usable", "usable"]


def test_a_reader_that_takes_too_long_is_ended() -> None:
    sandbox.close()
    with pytest.raises(CaseError, match="dicom_worker"):
        # 0 seconds: not even a new process can have answered.
        sandbox.ask({"command": "headers", "files": []}, timeout_s=0.0)


def test_a_reader_cannot_use_more_memory_than_its_limit(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dicom_slice: Make,
    save: Save,
    planes: Study,
) -> None:
    save(dicom_slice(np.zeros((9000, 9000), dtype=np.uint16)), tmp_path / "a.dcm")
    sandbox.close()
    monkeypatch.setattr(sandbox, "MEMORY_BYTES", 700 * 1024**2)
    found = READERS["dicom"].find(DataSource(format="dicom", path=tmp_path), planes)
    with pytest.raises(CaseError, match="dicom_worker"):
        READERS["dicom"].load(found.cases[0], planes)
    sandbox.close()


def test_a_file_in_the_current_folder_does_not_stand_in_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts a command may stand in a folder that others fill."""
    (tmp_path / "pydicom.py").write_text("open('ran', 'w').close(); raise SystemExit(3)")
    sandbox.close()
    monkeypatch.chdir(tmp_path)
    try:
        answer = sandbox.ask({"command": "headers", "files": []}, timeout_s=60.0)
    finally:
        sandbox.close()
    assert not (tmp_path / "ran").exists()
    assert answer.array is None
