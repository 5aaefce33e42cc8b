"""What becomes of each kind of attribute, on one image that has a secret in every place."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmwrite
from pydicom.dataset import Dataset

from medfl.client.deid import table
from medfl.common.errors import CaseError
from medfl.common.site import Deid

Make = Callable[..., Dataset]
Write = Callable[[Dataset, Path], Path]
Deidentify = Callable[..., Dataset]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"retain_longitudinal": "none"},
    {"clean_descriptors": True},
    {"retain_safe_private": True},
]


def content_of(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset)
    return buffer.getvalue()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "basic"))
def test_nothing_planted_comes_out(
    planted: Make,
    write: Write,
    deidentify: Deidentify,
    telling_of: Callable[..., set[str]],
    leaks: Callable[[set[str], bytes], set[str]],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    path = write(planted(), tmp_path / "Quillfeather_Ottoline.dcm")
    telling = telling_of(planted(), path) | {"Quillfeather", "QUILLFEATHER", "Ottoline", "Brannock"}
    known = {"SIEMENS MR HEADER"} if options.get("retain_safe_private") else set()
    descriptions = {"Chest"} | ({"Thorax", "axial"} if options.get("clean_descriptors") else set())
    found = leaks(telling - known - descriptions, content_of(deidentify(path, **options)))
    assert found == set()
    assert len(telling) > 35


def test_the_grep_finds_what_is_there(
    planted: Make, telling_of: Callable[..., set[str]], leaks: Callable[..., set[str]]
) -> None:
    """Otherwise the test above would prove nothing."""
    telling = telling_of(planted())
    assert leaks(telling, content_of(planted())) >= {
        "Mandelbrook", "HOSP-778812", "19230514", "20190228", "OLD-554433", "nested Quillfeather",
        "1.2.826.1.4711.77", "Ottoline was here", "SN-8812-77", "Saint Brannock Infirmary",
    }  # fmt: skip


def test_what_the_picture_needs_stays(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    result = deidentify(write(planted(), tmp_path / "a.dcm"))
    original = planted()
    for keyword in ("Rows", "PixelSpacing", "ImagePositionPatient", "Modality", "PixelData"):
        assert result[keyword].value == original[keyword].value
    assert result.ImageType == ["ORIGINAL", "PRIMARY", "OTHER"]
    assert [str(i.CodeMeaning) for i in result.AnatomicRegionSequence] == ["Chest"]


def test_the_method_is_declared_with_the_codes_of_the_options(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    path = write(planted(BurnedInAnnotation="NO"), tmp_path / "a.dcm")
    result = deidentify(path, retain_longitudinal="full", retain_device=True)
    assert result.PatientIdentityRemoved == "YES"
    assert result.BurnedInAnnotation == "NO"
    assert result.LongitudinalTemporalInformationModified == "UNMODIFIED"
    codes = [str(item.CodeValue) for item in result.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113106", "113109"]
    assert {i.CodingSchemeDesignator for i in result.DeidentificationMethodCodeSequence} == {"DCM"}
    default = deidentify(path)
    codes = [str(item.CodeValue) for item in default.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113107"]


@pytest.mark.parametrize(
    ("option", "keyword", "kept"),
    [
        ("retain_device", "DeviceSerialNumber", "SN-8812-77"),
        ("retain_institution", "InstitutionName", "Saint Brannock Infirmary"),
        ("retain_patient_characteristics", "PatientSex", "F"),
        ("retain_patient_characteristics", "PatientWeight", "61.25"),
        ("clean_descriptors", "StudyDescription", "ct thorax axial"),
    ],
)
def test_an_option_retains_what_it_names_and_only_then(
    planted: Make,
    write: Write,
    deidentify: Deidentify,
    tmp_path: Path,
    option: str,
    keyword: str,
    kept: str,
) -> None:
    path = write(planted(), tmp_path / "a.dcm")
    assert str(deidentify(path, **{option: True})[keyword].value) == kept
    assert str(deidentify(path).get(keyword, "")) in ("", "REMOVED")


def test_without_its_option_an_attribute_falls_under_the_basic_profile() -> None:
    by_name = {row.keyword: row for row in table.rows().values()}
    for keyword in ("DeviceSerialNumber", "InstitutionName", "PatientAge", "StudyDescription"):
        assert table.action(by_name[keyword], Deid()) in ("dummy", "remove")
    assert table.action(by_name["StudyDate"], Deid(retain_longitudinal="none")) == "empty"
    assert table.action(by_name["PatientBirthDate"], Deid(retain_longitudinal="full")) == "empty"


def test_an_age_of_ninety_or_more_is_told_as_ninety(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    for age, told in {"095Y": "090Y", "090Y": "090Y", "089Y": "089Y", "006M": "006M"}.items():
        path = write(planted(PatientAge=age), tmp_path / "a.dcm")
        assert deidentify(path, retain_patient_characteristics=True).PatientAge == told


def moment(dataset: Dataset, kind: str) -> datetime:
    text = str(dataset[f"{kind}Date"].value) + str(dataset[f"{kind}Time"].value).split(".")[0]
    return datetime.strptime(text, "%Y%m%d%H%M%S")


def test_intervals_survive_the_shift_across_midnight_and_images(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    one = deidentify(write(planted(), tmp_path / "a.dcm"))
    later = planted(instance="1.2.3", StudyDate="20200228", StudyTime="233015")
    other = deidentify(write(later, tmp_path / "b.dcm"))
    assert (moment(one, "Series") - moment(one, "Study")).total_seconds() == 31 * 60 + 45
    assert (moment(other, "Study") - moment(one, "Study")).days == 365
    acquired = datetime.strptime(one.AcquisitionDateTime.split(".")[0], "%Y%m%d%H%M%S")
    assert (acquired - moment(one, "Study")).total_seconds() == 31 * 60 + 15
    assert "+" not in one.AcquisitionDateTime
    assert moment(one, "Study") < datetime(2018, 3, 2)


def test_another_patient_is_shifted_otherwise(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    one = deidentify(write(planted(), tmp_path / "a.dcm"))
    other = deidentify(write(planted(PatientID="HOSP-778813"), tmp_path / "b.dcm"))
    assert one.StudyDate != other.StudyDate
    assert one.PatientID != other.PatientID
    assert one.StudyInstanceUID == other.StudyInstanceUID


def test_full_dates_stay_and_none_leaves_no_date(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    path = write(planted(), tmp_path / "a.dcm")
    full = deidentify(path, retain_longitudinal="full")
    assert (full.StudyDate, full.StudyTime) == ("20190228", "233015.5")
    assert full.PatientBirthDate in ("", None)
    none = deidentify(path, retain_longitudinal="none")
    assert none.StudyDate in ("", None)
    assert none.SeriesDate == "19000101"


def test_a_nonsense_date_does_not_pass(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    dataset = planted()
    dataset[0x00080022] = dataset["StudyDate"].__class__(
        0x00080022, "DA", "Smith1", validation_mode=0
    )
    path = write(dataset, tmp_path / "a.dcm")
    for dates in ("full", "shifted", "none"):
        assert "Smith1" not in str(deidentify(path, retain_longitudinal=dates))


def test_a_text_under_the_tag_of_a_number_does_not_pass(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    dataset = planted()
    dataset.add_new(0x00180080, "LT", "Ottoline lives in Elm Street")
    dataset.add_new(0x00080008, "LO", "Ottoline Quillfeather")
    result = deidentify(write(dataset, tmp_path / "a.dcm"))
    assert "RepetitionTime" not in result
    assert "ImageType" not in result


def test_a_uid_that_only_looks_registered_is_replaced(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    """The standard's root with a patient's number behind it is nobody's class."""
    fake = "1.2.840.10008.5.1.4.778812"
    path = write(planted(FrameOfReferenceUID=fake), tmp_path / "a.dcm")
    result = deidentify(path)
    assert result.FrameOfReferenceUID.startswith("2.25.")
    assert result.SOPClassUID == planted().SOPClassUID
    reference = result.SourceImageSequence[0]
    assert reference.ReferencedSOPClassUID == planted().SOPClassUID
    assert reference.ReferencedSOPInstanceUID.startswith("2.25.")
    assert len(reference.ReferencedSOPInstanceUID) <= 64


def test_a_reference_still_points_to_its_image(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    one = deidentify(write(planted(), tmp_path / "a.dcm"))
    source = deidentify(write(planted(instance="1.2.826.1.4711.77"), tmp_path / "b.dcm"))
    assert one.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID


def test_safe_private_attributes_stay_only_where_asked_for(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    path = write(planted(), tmp_path / "a.dcm")
    assert not [e for e in deidentify(path) if e.tag.is_private]
    result = deidentify(path, retain_safe_private=True)
    block = result.private_block(0x0019, "SIEMENS MR HEADER")
    assert block[0x0C].value == 1000
    assert 0x09 not in block


def test_an_overlay_in_unused_bits_of_the_pixels_is_removed(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    dataset = planted(PixelData=(np.arange(12, dtype="<u2") | 0x1000).tobytes())
    del dataset[0x60003000]
    dataset.add_new(0x60000102, "US", 12)
    result = deidentify(write(dataset, tmp_path / "a.dcm"))
    assert np.array_equal(np.frombuffer(result.PixelData, "<u2"), np.arange(12))
    assert not [t for t in result.keys() if t >> 24 == 0x60]


def test_bytes_behind_the_picture_are_removed(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    pixels = np.arange(12, dtype="<u2").tobytes()
    path = write(planted(PixelData=pixels + b"Quillfeather!!"), tmp_path / "a.dcm")
    assert deidentify(path).PixelData == pixels


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"BurnedInAnnotation": "YES"}, "burned_in"),
        ({"Modality": "US"}, "burned_in_unknown"),
        ({"Modality": "XA"}, "burned_in_unknown"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "burned_in_unknown"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "not_an_image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "not_an_image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1"}, "not_an_image"),
        ({"SOPClassUID": "1.3.12.2.1107.5.9.1"}, "not_an_image"),
    ],
)
def test_what_must_not_be_passed_on_is_refused(
    planted: Make,
    write: Write,
    deidentify: Deidentify,
    tmp_path: Path,
    elements: dict[str, str],
    reason: str,
) -> None:
    dataset = planted(**elements)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    with pytest.raises(CaseError) as caught:
        deidentify(write(dataset, tmp_path / "a.dcm"))
    assert caught.value.reason == reason


def test_an_ultrasound_that_says_it_is_clean_passes(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    path = write(planted(Modality="US", BurnedInAnnotation="NO"), tmp_path / "a.dcm")
    assert deidentify(path).Modality == "US"


def test_the_preamble_is_empty_and_the_file_names_nobody(
    planted: Make, write: Write, deidentify: Deidentify, tmp_path: Path
) -> None:
    result = deidentify(write(planted(), tmp_path / "a.dcm"))
    assert result.preamble == bytes(128)
    assert "SourceApplicationEntityTitle" not in result.file_meta


def test_the_table_is_whole_and_says_what_the_standard_says() -> None:
    rows = table.rows()
    assert len(rows) == 652
    codes = {
        "PatientName": "Z", "PatientID": "Z/D", "StudyDate": "Z", "SeriesDate": "X/D",
        "StudyInstanceUID": "U", "ReferencedImageSequence": "X/Z/U*", "AccessionNumber": "Z",
        "InstitutionName": "X/Z/D", "PatientAge": "X", "ContentSequence": "D",
    }  # fmt: skip
    by_name = {row.keyword: row for row in rows.values()}
    assert {name: by_name[name].basic for name in codes} == codes
    assert by_name["StationName"].device == "K"
    assert by_name["InstitutionName"].institution == "K"
    assert by_name["PatientSex"].patient == "K"
    assert (by_name["StudyDate"].full_dates, by_name["StudyDate"].modified_dates) == ("K", "C")
    assert by_name["StudyDescription"].descriptors == "C"
    assert not table.kept() & set(by_name)
