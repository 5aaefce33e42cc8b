"""Segments of a DICOM SEG: their class by label or code, their place by the frame of reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medfl.client.data.cohort import examine
from medfl.client.readers import dicom
from medfl.client.readers.structures import class_of, names_of
from medfl.common.errors import CaseError, DataError
from medfl.common.source import DataSource
from medfl.common.study import ImageInput, Study

Make = Callable[..., Dataset]
Save = Callable[[Dataset, Path], Path]
Studies = Callable[..., Study]
CLASSES = ("background", "liver", "tumour")
LIVER = ("10200004", "SCT")


def slices_of(make: Make, frame: str = "1.2.9", series: str = "1.2.3") -> list[Dataset]:
    """Three slices, complete enough for highdicom to refer to them."""
    slices = []
    for k in range(3):
        pixels = np.arange(12, dtype=np.int16).reshape(3, 4) + 10 * k
        ds = make(pixels, position=(0.0, 0.0, 5.0 * k), series=series)
        for name in ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            setattr(ds, name, "")
        ds.FrameOfReferenceUID, ds.SliceThickness = frame, 5.0
        ds.StudyDate = ds.StudyTime = ds.ReferringPhysicianName = ""
        slices.append(ds)
    return slices


def seg(source: list[Dataset], labels: Sequence[str], arrays: Sequence[NDArray[Any]]) -> Dataset:
    """One segment a label, all with the code of the liver."""
    import highdicom as hd
    from highdicom.sr.coding import CodedConcept

    described = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=CodedConcept("123037004", "SCT", "Anatomical Structure"),
            segmented_property_type=CodedConcept(*LIVER, "Liver"),
            algorithm_type="MANUAL",
        )
        for number, label in enumerate(labels, start=1)
    ]
    return hd.seg.Segmentation(
        source_images=source,
        pixel_array=np.stack(arrays, -1).astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="a",
        manufacturer_model_name="b",
        software_versions="c",
        device_serial_number="d",
    )


def box(rows: slice, columns: slice) -> NDArray[np.uint8]:
    drawn = np.zeros((3, 3, 4), dtype=np.uint8)
    drawn[1, rows, columns] = 1
    return drawn


LEFT, RIGHT = box(slice(0, 3), slice(0, 2)), box(slice(0, 3), slice(2, 4))


def rule(study: Studies, label_map: dict[str, str] | None = None, dimensions: int = 3) -> Study:
    image = ImageInput(dimensions=dimensions, size=[4] * dimensions, intensity="none")
    return study("segmentation", CLASSES, label_map, image=image)


def masks(folder: Path, studied: Study) -> list[NDArray[np.generic]]:
    found = dicom.find(DataSource(format="dicom", path=folder), studied)
    return [dicom.load_mask(ref, studied).array for ref in found.cases]


def saved(save: Save, folder: Path, slices: list[Dataset], segments: Dataset) -> Path:
    for k, ds in enumerate(slices):
        save(ds, folder / f"{k}.dcm")
    save(segments, folder / "seg.dcm")
    return folder


def test_a_segments_label_decides_and_not_its_number(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    slices = slices_of(dicom_slice)
    # Segment 1 is the tumour (class 2) in columns 0 and 1, segment 2 the liver in 2 and 3.
    saved(save, tmp_path, slices, seg(slices, ("tumour", "Liver"), (LEFT, RIGHT)))
    assert masks(tmp_path, rule(study))[0][:, 0, 1].tolist() == [2, 2, 1, 1]


def test_a_segment_with_another_label_is_none_of_the_classes_whatever_its_number(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    slices = slices_of(dicom_slice)
    saved(save, tmp_path, slices, seg(slices, ("liver", "portal vein"), (LEFT, RIGHT)))
    with pytest.raises(CaseError, match=r"'portal vein'.*SCT:10200004") as caught:
        masks(tmp_path, rule(study))
    assert caught.value.reason == "segment_unknown"
    # Someone may say that all else is background.
    assert masks(tmp_path, rule(study, {"*": "background"}))[0][:, 0, 1].tolist() == [1, 1, 0, 0]


def test_segments_of_one_class_may_overlap_and_of_two_may_not(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    slices = slices_of(dicom_slice)
    three = box(slice(0, 3), slice(0, 3))
    saved(save, tmp_path, slices, seg(slices, ("core", "oedema"), (three, RIGHT)))
    whole = {"core": "tumour", "oedema": "tumour"}
    assert masks(tmp_path, rule(study, whole))[0][:, 0, 1].tolist() == [2, 2, 2, 2]
    with pytest.raises(CaseError, match="mask_overlap"):
        masks(tmp_path, rule(study, {"core": "tumour", "oedema": "liver"}))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_seg_of_another_frame_of_reference_is_not_used(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies, dimensions: int
) -> None:
    slices = slices_of(dicom_slice)
    drawn = seg(slices, ("liver",), (LEFT,))
    drawn.FrameOfReferenceUID = "1.2.8"
    saved(save, tmp_path, slices, drawn)
    with pytest.raises(CaseError, match="mask_frame"):
        masks(tmp_path, rule(study, dimensions=dimensions))


def test_a_seg_that_names_no_series_belongs_to_the_only_one_that_it_can(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    slices = slices_of(dicom_slice)
    drawn = seg(slices, ("liver",), (LEFT,))
    del drawn.ReferencedSeriesSequence
    saved(save, tmp_path / "named", slices, drawn)
    assert [int(m.sum()) for m in masks(tmp_path / "named", rule(study))] == [6]

    # Nor does it name images: then its frame of reference must be that of one series only.
    for group in drawn.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence
    saved(save, tmp_path / "frame", slices, drawn)
    assert [int(m.sum()) for m in masks(tmp_path / "frame", rule(study))] == [6]
    for k, ds in enumerate(slices_of(dicom_slice, series="1.2.4")):
        save(ds, tmp_path / "frame" / f"other-{k}.dcm")
    with pytest.raises(CaseError, match="mask_missing"):
        masks(tmp_path / "frame", rule(study))


def test_a_slice_that_was_not_segmented_is_not_taken_for_healthy(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    slices = slices_of(dicom_slice)
    # Only slices 0 and 1 were looked at; slice 2 is of the same series.
    saved(save, tmp_path, slices, seg(slices[:2], ("liver",), (LEFT[:2],)))
    studied = rule(study, dimensions=2)
    sums = {}
    for ref in dicom.find(DataSource(format="dicom", path=tmp_path), studied).cases:
        try:
            sums[ref.files[0].name] = int(np.asarray(dicom.load_mask(ref, studied).array).sum())
        except CaseError as error:
            sums[ref.files[0].name] = error.reason  # type: ignore[assignment]
    assert sums == {"0.dcm": 0, "1.dcm": 6, "2.dcm": "mask_geometry"}


def test_codes_speak_where_the_map_names_them_and_numbers_where_nothing_else_does(
    study: Studies,
) -> None:
    task = study("segmentation", CLASSES, {"SCT:10200004": "liver", "7": "tumour"}).task
    names = names_of(task)
    assert class_of("Leber", ["10200004", "SCT:10200004"], 5, names) == 1
    assert class_of("tumour", [], 1, names) == 2
    assert class_of("Segment_2", [], 2, names) == 2
    assert class_of("Segment 7", ["99", "SCT:99"], 7, names) == 2
    with pytest.raises(CaseError, match="segment_ambiguous"):
        class_of("tumour", ["10200004", "SCT:10200004"], 1, names)
    # A label that repeats another number, or an unknown code, is no reason to trust the number.
    for label, codes in (("Segment_1", []), ("Segment_2", ["99", "SCT:99"]), ("2a", [])):
        with pytest.raises(CaseError, match="segment_unknown"):
            class_of(label, codes, 2, names)


def test_a_hospitals_own_words_for_structures_come_before_the_studys(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    slices = slices_of(dicom_slice)
    saved(save, tmp_path, slices, seg(slices, ("GTV", "Leber"), (LEFT, RIGHT)))
    studied = rule(study, {"hepar": "liver", "GTV": "liver"})
    # "Leber" is the study's "hepar"; "GTV" is another thing here than the study thinks.
    words = {"mask": {"GTV": "tumour", "Leber": "hepar"}}
    source = DataSource(format="dicom", path=tmp_path, values=words)
    seen = examine(source, studied, cache=None).cohort
    assert np.bincount(np.asarray(seen.targets[0]).ravel(), minlength=3)[1:].tolist() == [6, 6]
    silent = examine(DataSource(format="dicom", path=tmp_path), studied, cache=None).cohort
    assert [q.reason for q in silent.quarantined] == ["segment_unknown"]
    wrong = DataSource(format="dicom", path=tmp_path, values={"mask": {"GTV": "kidney"}})
    with pytest.raises(DataError, match="'GTV' stands for 'kidney'"):
        examine(wrong, studied, cache=None)
