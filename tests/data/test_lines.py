"""Which line of a table and which mask belong to an image: by the mapped key, by no coincidence."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset

from medfl.client.data.cases import Found
from medfl.client.data.cohort import examine, find_cases
from medfl.common.source import DataSource
from medfl.common.study import Evaluation, Feature, ImageInput, Quality, RecordInput, Study

Studies = Callable[..., Study]
Make = Callable[..., Dataset]
Save = Callable[[Dataset, Path], Path]
LENIENT = Quality(max_quarantined=0.9, min_cases=1)


@pytest.fixture
def flat(study: Studies) -> Study:
    image = ImageInput(dimensions=2, size=[3, 4], intensity="none")
    return study(image=image, quality=LENIENT, evaluation=Evaluation(test=0.0, validation=0.0))


@pytest.fixture
def exam(tmp_path: Path, dicom_slice: Make, save: Save) -> Callable[..., None]:
    """One picture in data/NAME, of its own series and study."""

    def make(name: str, patient: str, **elements: Any) -> None:
        seed = len(list((tmp_path / "data").rglob("*.dcm")))
        pixels = np.random.default_rng(seed).integers(0, 99, (3, 4)).astype(np.int16)
        uids = {"series": f"1.2.{seed}.7", "StudyInstanceUID": f"1.2.{seed}"}
        save(dicom_slice(pixels, PatientID=patient, **uids, **elements), tmp_path / "data" / name)

    return make


def source(folder: Path, *lines: str, **more: Any) -> DataSource:
    (folder / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    more = {"format": "dicom", **more}
    return DataSource(path=folder / "data", table=folder / "t.csv", **more)


def labels(found: Found) -> dict[str, str]:
    """By file."""
    return {ref.files[0].name: ref.fields["label"] for ref in found.cases}


def left(found: Found) -> list[str]:
    return sorted(q.reason for q in found.quarantined)


def test_a_patients_number_is_never_taken_for_a_files_name(
    tmp_path: Path, exam: Callable[..., None], flat: Study
) -> None:
    # Patients 1..4 lie in 4.dcm..1.dcm; by file name every label was another patient's.
    for n in range(1, 5):
        exam(f"{5 - n}.dcm", str(n))
    rows = [f"{n},{'yes' if n < 3 else 'no'}" for n in range(1, 5)]
    found = find_cases(source(tmp_path, "patient,label", *rows), flat)
    assert labels(found) == {"4.dcm": "yes", "3.dcm": "yes", "2.dcm": "no", "1.dcm": "no"}
    assert {r.files[0].name: r.patient for r in found.cases}["4.dcm"] == "1"


def test_a_name_that_means_one_images_file_and_anothers_patient_is_ambiguous(
    tmp_path: Path, exam: Callable[..., None], flat: Study
) -> None:
    for n in (1, 2):
        exam(f"{3 - n}.dcm", str(n))
    exam("other.dcm", "3")
    rows = ("1,yes", "2,no", "3,yes")
    found = find_cases(source(tmp_path, "case,label", *rows), flat)
    assert labels(found) == {"other.dcm": "yes"}
    assert left(found) == ["ambiguous_line", "ambiguous_line"]
    mapped = source(tmp_path, "id,label", *rows, columns={"patient": "id"})
    assert labels(find_cases(mapped, flat)) == {"2.dcm": "yes", "1.dcm": "no", "other.dcm": "yes"}


def test_visits_that_disagree_are_left_out_until_a_column_tells_them_apart(
    tmp_path: Path, exam: Callable[..., None], flat: Study
) -> None:
    exam("first.dcm", "p1", AccessionNumber="A1")
    exam("second.dcm", "p1", AccessionNumber="A2")
    exam("b.dcm", "p2", AccessionNumber="A3")
    exam("c.dcm", "p3", AccessionNumber="A4")
    rows = ("p1,A1,yes", "p1,A2,no", "p2,A3,no", "p2,A9,no", "p3,A4,yes")
    found = find_cases(source(tmp_path, "patient,acc,label", *rows), flat)
    # p2's lines agree in what the study uses.
    assert labels(found) == {"b.dcm": "no", "c.dcm": "yes"}
    assert left(found) == ["ambiguous_line", "ambiguous_line"]
    told = source(tmp_path, "patient,acc,label", *rows, columns={"accession": "acc"})
    found = find_cases(told, flat)
    assert labels(found) == {"first.dcm": "yes", "second.dcm": "no", "b.dcm": "no", "c.dcm": "yes"}
    assert left(found) == ["no_image"]  # A9


def test_a_column_is_a_key_only_where_it_is_mapped(
    tmp_path: Path, exam: Callable[..., None], flat: Study
) -> None:
    exam("a.dcm", "p1")
    rows = ("patient,study,label", "p1,trial 7,yes")
    assert labels(find_cases(source(tmp_path, *rows), flat)) == {"a.dcm": "yes"}


def test_copies_under_two_lines_that_disagree_are_ambiguous(
    tmp_path: Path, exam: Callable[..., None], flat: Study
) -> None:
    exam("a/1.dcm", "p1")
    (tmp_path / "data/b").mkdir()
    (tmp_path / "data/b/1.dcm").write_bytes((tmp_path / "data/a/1.dcm").read_bytes())
    found = find_cases(source(tmp_path, "image,label", "a/1.dcm,yes", "b/1.dcm,no"), flat)
    assert labels(found) == {}
    assert left(found) == ["ambiguous_line", "duplicate"]


def test_numbers_that_lost_their_zeros_are_named_as_that(
    tmp_path: Path, exam: Callable[..., None], flat: Study
) -> None:
    exam("a.dcm", "0001")
    exam("b.dcm", "0002")
    found = find_cases(source(tmp_path, "patient,label", "1,yes", "0002,no"), flat)
    assert labels(found) == {"b.dcm": "no"}
    [told] = found.quarantined
    assert (told.reason, told.detail) == ("name_differs", "the table has '1', the image '0001'")


def test_a_spreadsheets_point_zero_finds_its_image_and_is_said(
    tmp_path: Path, exam: Callable[..., None], flat: Study
) -> None:
    exam("a.dcm", "17")
    exam("b.dcm", "18")
    examined = examine(source(tmp_path, "patient,label", "17.0,yes", "18,no"), flat, cache=None)
    assert labels(Found(examined.listed)) == {"a.dcm": "yes", "b.dcm": "no"}
    assert [n for n in examined.notes if '"1.0" counts as "1"' in n and n.startswith("1 cases")]


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_rows_of_one_picture_that_disagree_are_left_out(tmp_path: Path, flat: Study) -> None:
    for seed, name in enumerate("abc"):
        picture(tmp_path / "data" / f"{name}.png", seed)
    rows = ("1,a.png,yes", "2,a.png,no", "3,b,no", "4,b.png,no", "5,c.png,yes")
    table = source(tmp_path, "case,image,label", *rows, format="image")
    cohort = examine(table, flat, cache=None).cohort
    assert sorted(np.asarray(cohort.targets).tolist()) == [0, 1]
    told = sorted((q.case_id, q.reason) for q in cohort.quarantined)
    assert told == [("1", "ambiguous_line"), ("2", "ambiguous_line"), ("4", "duplicate")]


@pytest.mark.parametrize("table", ["M\u00fcller.png", "m\u00fcller", "M\u00fcller .png"])
def test_a_files_name_in_another_form_is_named_as_that(
    tmp_path: Path, flat: Study, table: str
) -> None:
    picture(tmp_path / "data" / unicodedata.normalize("NFD", "M\u00fcller.png"), 0)
    picture(tmp_path / "data" / "plain.png", 1)
    rows = (f"{table},yes", "plain.png,no", "gone.png,no")
    found = find_cases(source(tmp_path, "image,label", *rows, format="image"), flat)
    assert labels(found) == {"plain.png": "no"}
    assert left(found) == ["file_missing", "name_differs"]


def records(study: Studies) -> Study:
    record = RecordInput(features=[Feature(name="age")], scale="none")
    return study("risk", record=record, quality=LENIENT)


def test_two_visits_of_a_record_need_a_visit_column(tmp_path: Path, study: Studies) -> None:
    rows = ("patient,when,age,label", "1,a,40,no", "1,b,41,yes", "2,a,50,no", "2,b,50,no")
    table = replace(source(tmp_path, *rows, format="table"), path=tmp_path / "t.csv")
    found = find_cases(table, records(study))
    assert [r.case_id for r in found.cases] == ["2"]
    assert left(found) == ["ambiguous_line", "ambiguous_line", "duplicate_id"]
    found = find_cases(replace(table, columns={"visit": "when"}), records(study))
    assert [r.fields["age"] for r in found.cases] == ["40", "41", "50", "50"]
    assert [r.patient for r in found.cases] == ["1", "1", "2", "2"]


def test_patients_that_look_alike_are_told(tmp_path: Path, study: Studies) -> None:
    rows = ("patient,age,label", "004,40,no", "4,41,yes", "5,50,no", "6,60,yes")
    table = replace(source(tmp_path, *rows, format="table"), path=tmp_path / "t.csv")
    notes = examine(table, records(study), cache=None).notes
    assert [n for n in notes if n.startswith("2 patients' numbers look like another one")]


def test_one_mask_never_serves_two_images(
    tmp_path: Path, exam: Callable[..., None], planes: Study
) -> None:
    exam("frontal.dcm", "p1")
    exam("lateral.dcm", "p1")
    exam("c.dcm", "p2")
    (tmp_path / "masks").mkdir()
    for name in ("p1", "p2"):
        mask = np.zeros((3, 4), dtype=np.uint8)
        mask[1, 1] = 1
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    data = DataSource(format="dicom", path=tmp_path / "data", masks=tmp_path / "masks")
    cohort = examine(data, replace(planes, quality=LENIENT), cache=None).cohort
    assert [(q.reason, q.detail) for q in cohort.quarantined] == [
        ("mask_shared", "p1.png would serve 2 images")
    ] * 2
    assert len(cohort.cases) == 1


def test_of_two_masks_of_one_picture_none_is_chosen(tmp_path: Path, planes: Study) -> None:
    for seed, name in enumerate(("a.png", "a_mask.png", "a_seg.png", "b.png", "b_mask.png")):
        picture(tmp_path / "data" / name, seed)
    found = find_cases(DataSource(format="image", path=tmp_path / "data"), planes)
    assert [r.files[0].name for r in found.cases] == ["b.png"]
    assert [(q.reason, q.detail) for q in found.quarantined] == [
        ("several_masks", "a_mask.png, a_seg.png")
    ]


def test_four_digits_number_the_cases_where_the_labels_have_the_whole_name(
    tmp_path: Path, volumes: Study
) -> None:
    def write(name: str) -> None:
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), path)

    for name in ("p_0001", "p_0002", "q_0000", "q_0001"):
        write(f"imagesTr/{name}")
    for name in ("p_0001", "p_0002", "q"):
        write(f"labelsTr/{name}")
    found = find_cases(DataSource(format="decathlon", path=tmp_path), volumes)
    files = {r.case_id: (len(r.files), r.mask_files[0].name) for r in found.cases}
    assert files == {
        "p_0001": (1, "p_0001.nii.gz"),
        "p_0002": (1, "p_0002.nii.gz"),
        "q": (2, "q.nii.gz"),
    }
