"""DICOM as hospitals have it: order, place, values, compression, multi-frame, segmentations."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedMRImageStorage, generate_uid

from medfl.client.data.cases import Found, Picture
from medfl.client.data.cohort import build_cohort
from medfl.client.readers import READERS
from medfl.common.errors import CaseError
from medfl.common.site import Cache
from medfl.common.source import DataSource
from medfl.common.study import ImageInput, Quality, Study

Make = Callable[..., Dataset]
Save = Callable[[Dataset, Path], Path]
dicom = READERS["dicom"]


def find(folder: Path, study: Study, **more: Any) -> Found:
    return dicom.find(DataSource(format="dicom", path=folder, **more), study)


def only(folder: Path, study: Study) -> Picture:
    found = find(folder, study)
    assert len(found.cases) == 1, found.quarantined
    return dicom.load(found.cases[0], study)


def series(folder: Path, make: Make, save: Save, slices: int = 3, **elements: Any) -> None:
    """Slice k holds the value k everywhere and lies at z = 30 + 5k; names run the other way."""
    for k in range(slices):
        pixels = np.full((3, 4), k, dtype=np.int16)
        save(
            make(pixels, position=(10.0, 20.0, 30.0 + 5 * k), **elements),
            folder / f"{slices - k}.dcm",
        )


def test_slices_are_ordered_by_place_and_never_by_file_name(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    series(tmp_path, dicom_slice, save)
    picture = only(tmp_path, volumes)
    assert picture.array.shape == (1, 4, 3, 3)
    assert picture.array[0, 0, 0].tolist() == [0, 1, 2]


def test_the_affine_puts_a_corner_where_the_standard_says(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    series(tmp_path, dicom_slice, save)
    picture = only(tmp_path, volumes)
    assert picture.affine is not None
    assert picture.spacing_mm == (0.5, 2.0, 5.0)
    # Column 3, row 2, slice 1: x = 10 + 3*0.5, y = 20 + 2*2, z = 30 + 5 in LPS; RAS turns x and y.
    assert (picture.affine @ [3, 2, 1, 1])[:3].tolist() == [-11.5, -24.0, 35.0]


def test_a_coronal_series_is_ordered_along_its_own_normal(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    for k in range(3):
        pixels = np.full((3, 4), k, dtype=np.int16)
        ds = dicom_slice(pixels, position=(0.0, 4.0 * k, 0.0))
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        save(ds, tmp_path / f"{k}.dcm")
    picture = only(tmp_path, volumes)
    assert picture.affine is not None
    # The normal of (x, -z) is +y, so slice 0 lies in front; RAS counts to the front.
    assert picture.array[0, 0, 0].tolist() == [0, 1, 2]
    assert (picture.affine @ [0, 0, 2, 1])[:3].tolist() == [0.0, -8.0, 0.0]


def test_rescaling_gives_hounsfield_units(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    save(dicom_slice(RescaleSlope=2, RescaleIntercept=-1000), tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[0, 0].tolist() == [-1000, -998, -996, -994]


@pytest.mark.parametrize(
    ("dtype", "expected"), [(np.uint16, [65535, 65534, 65533]), (np.int16, [-1, -2, -3])]
)
def test_monochrome1_is_turned_over(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study, dtype: Any, expected: list[int]
) -> None:
    pixels = np.array([[0, 1, 2]], dtype=dtype)
    ds = dicom_slice(pixels, PhotometricInterpretation="MONOCHROME1", Modality="DX")
    save(ds, tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[0, 0].tolist() == expected


def test_monochrome1_leaves_hounsfield_units_alone(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    save(dicom_slice(PhotometricInterpretation="MONOCHROME1"), tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[0, 0].tolist() == [0, 1, 2, 3]


def test_signed_and_unsigned_values_keep_their_sign(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    save(dicom_slice(np.array([[-5, 5]], dtype=np.int16)), tmp_path / "a" / "a.dcm")
    save(dicom_slice(np.array([[65000, 5]], dtype=np.uint16)), tmp_path / "b" / "b.dcm")
    assert only(tmp_path / "a", planes).array.ravel().tolist() == [-5, 5]
    assert only(tmp_path / "b", planes).array.ravel().tolist() == [65000, 5]


def test_a_detector_without_pixel_spacing_gives_the_imagers(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    ds = dicom_slice(Modality="MG", ImagerPixelSpacing=[0.1, 0.1])
    del ds.PixelSpacing, ds.ImagePositionPatient, ds.ImageOrientationPatient
    save(ds, tmp_path / "a.dcm")
    assert only(tmp_path, planes).spacing_mm == (0.1, 0.1)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("MR_small_RLE.dcm", 0),
        ("MR_small_jp2klossless.dcm", 0),
        ("MR_small_jpeg_ls_lossless.dcm", 0),
        ("MR_small_bigendian.dcm", 0),
        ("MR_small_implicit.dcm", 0),
    ],
)
def test_every_transfer_syntax_gives_the_same_picture(
    tmp_path: Path, planes: Study, name: str, tolerance: float
) -> None:
    for folder, file in (("plain", "MR_small.dcm"), ("other", name)):
        (tmp_path / folder).mkdir()
        shutil.copy(str(pydicom.data.get_testdata_file(file, download=False)), tmp_path / folder)
    plain, other = only(tmp_path / "plain", planes), only(tmp_path / "other", planes)
    assert plain.array.max() > 0
    assert np.abs(plain.array - other.array).max() <= tolerance


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG2000.dcm"])
def test_lossy_pictures_are_read_or_refused_by_name(
    tmp_path: Path, planes: Study, name: str
) -> None:
    ds = pydicom.dcmread(str(pydicom.data.get_testdata_file(name, download=False)))
    ds.BurnedInAnnotation = "NO"
    ds.save_as(tmp_path / name)
    try:
        picture = only(tmp_path, planes)
    except CaseError as error:
        assert (name, error.reason) == ("JPGExtended.dcm", "dicom_codec")  # noqa: PT017
    else:
        assert picture.array.shape == (1, 1024, 256)
        assert picture.array.max() > picture.array.min()


def enhanced(make: Make, order: list[int], **elements: Any) -> Dataset:
    """Frames in the given order of places; the frame at place k holds k, slope k + 1."""
    ds = make(np.full((3, 4), 0, dtype=np.uint16), Modality="MR", **elements)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    del ds.PixelSpacing, ds.ImagePositionPatient, ds.ImageOrientationPatient
    ds.NumberOfFrames = len(order)
    shared = Dataset()
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing = [2.0, 0.5]
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in order:
        frame, position, scale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0.0, 0.0, 5.0 * k]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = k + 1, 10, "US"
        frame.PlanePositionSequence = [position]
        frame.PixelValueTransformationSequence = [scale]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = np.concatenate([np.full((3, 4), k, dtype=np.uint16) for k in order]).tobytes()
    return ds


def test_an_enhanced_file_is_ordered_and_rescaled_frame_by_frame(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    save(enhanced(dicom_slice, [2, 0, 1]), tmp_path / "a.dcm")
    picture = only(tmp_path, volumes)
    # Place k: k * (k + 1) + 10.
    assert picture.array[0, 0, 0].tolist() == [10, 12, 16]
    assert picture.spacing_mm == (0.5, 2.0, 5.0)


def test_a_multi_frame_file_without_places_is_not_guessed_at(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    ds = enhanced(dicom_slice, [0, 1, 2])
    del ds.PerFrameFunctionalGroupsSequence
    save(ds, tmp_path / "a.dcm")
    with pytest.raises(CaseError, match="no_orientation"):
        only(tmp_path, volumes)


def test_colour_images_have_three_channels(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    save(dicom_slice(pixels, Modality="XC"), tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[:, 0, 1].tolist() == [3, 4, 5]


def test_a_lost_slice_a_second_volume_and_a_stray_direction_are_reported(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    for name, heights in {"gap": (0, 5, 15), "again": (0, 5, 0, 5)}.items():
        for i, z in enumerate(heights):
            pixels = np.arange(12, dtype=np.int16).reshape(3, 4) + i
            save(dicom_slice(pixels, position=(0, 0, z)), tmp_path / name / f"{i}.dcm")
    for i in range(3):
        ds = dicom_slice(position=(0, 0, 5 * i))
        if i == 2:
            ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        save(ds, tmp_path / "stray" / f"{i}.dcm")
        ds = dicom_slice(position=(0, 0, 5 * i), PixelSpacing=[2.0, 0.5 + 0.1 * (i == 1)])
        save(ds, tmp_path / "spacing" / f"{i}.dcm")
        ds = dicom_slice(position=(0, 0, 5 * i))
        del ds.ImageOrientationPatient
        save(ds, tmp_path / "lost" / f"{i}.dcm")
    expected = {
        "gap": "slice_gap",
        "again": "several_volumes",
        "stray": "mixed_geometry",
        "spacing": "mixed_geometry",
        "lost": "no_orientation",
    }
    for name, reason in expected.items():
        with pytest.raises(CaseError, match=reason):
            only(tmp_path / name, volumes)


def test_one_slice_is_no_volume(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    save(dicom_slice(), tmp_path / "a.dcm")
    with pytest.raises(CaseError, match="dimensions"):
        only(tmp_path, volumes)


def test_series_are_told_apart_and_keep_their_patient(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    series(tmp_path / "x", dicom_slice, save, series="1.2.3")
    series(tmp_path / "y", dicom_slice, save, slices=4, series="1.2.4", PatientID="p2")
    found = find(tmp_path, volumes)
    assert [(c.case_id, c.patient, c.size) for c in found.cases] == [
        ("1.2.3", "p1", (4, 3, 3)),
        ("1.2.4", "p2", (4, 3, 4)),
    ]


@pytest.mark.parametrize("by", ["file", "series", "study", "patient", "folder"])
def test_a_table_may_name_a_case_in_any_way(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Callable[..., Study], by: str
) -> None:
    series(tmp_path / "exam", dicom_slice, save, slices=2)
    names = {
        "file": ("image", "exam/2.dcm"),
        "series": ("case", "1.2.3"),
        "study": ("case", "1.2"),
        "patient": ("patient", "p1"),
        "folder": ("image", "exam"),
    }
    column, name = names[by]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[column, "label"], [name, "yes"], ["nobody", "no"]])
    three = study(image=ImageInput(dimensions=3, size=[4, 4, 4]))
    found = find(tmp_path, three, table=tmp_path / "labels.csv")
    assert [c.fields["label"] for c in found.cases] == ["yes"]
    assert [(q.case_id, q.reason) for q in found.quarantined] == [("nobody", "no_image")]


def test_copies_are_passed_over_but_two_contents_of_one_uid_are_set_aside(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    copied, first = dicom_slice(), dicom_slice()
    save(copied, tmp_path / "a.dcm")
    save(copied, tmp_path / "copy" / "a.dcm")
    save(first, tmp_path / "b.dcm")
    second = dicom_slice(np.full((3, 4), 9, dtype=np.int16))
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = first.SOPInstanceUID
    save(second, tmp_path / "c.dcm")
    found = find(tmp_path, planes)
    assert [c.case_id for c in found.cases] == [copied.SOPInstanceUID]
    assert sorted(q.reason for q in found.quarantined) == ["duplicate", "uid_conflict"]


@pytest.mark.parametrize("named", ["a,copy,yes\n", "a,exam,yes\n", "a,exam,yes\nd,copy,yes\n"])
def test_a_fault_is_reported_once(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Callable[..., Study], named: str
) -> None:
    series(tmp_path / "exam", dicom_slice, save)
    shutil.copytree(tmp_path / "exam", tmp_path / "copy")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.dcm").write_bytes(b"x")
    (tmp_path / "t.csv").write_text(f"case,image,label\n{named}b,broken,no\nc,gone,no\n")
    three = study(image=ImageInput(dimensions=3, size=[4, 4, 4]))
    found = find(tmp_path, three, table=tmp_path / "t.csv")
    assert len(found.cases) == 1
    assert sorted((q.case_id, q.reason) for q in found.quarantined) == [
        ("1.2.3", "duplicate"),
        ("broken/1.dcm", "not_dicom"),
        ("gone", "no_image"),
    ]


def exam(make: Make, uid: str, number: int) -> list[Dataset]:
    """Four slices of a patient, complete enough for highdicom to refer to them."""
    slices = []
    for k in range(4):
        pixels = np.arange(12, dtype=np.int16).reshape(3, 4) + 10 * k + 100 * number
        ds = make(pixels, position=(10.0, 20.0, 30.0 + 5 * k), series=uid, PatientID=f"p{number}")
        for name in ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            setattr(ds, name, "")
        ds.FrameOfReferenceUID, ds.SliceThickness = "1.2.9", 5.0
        ds.StudyDate = ds.StudyTime = ds.ReferringPhysicianName = ""
        slices.append(ds)
    return slices


def segment(source: list[Dataset], mask: Any, fractional: bool = False) -> Dataset:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    described = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="yes",
        segmented_property_category=codes.SCT.Organ,
        segmented_property_type=codes.SCT.Liver,
        algorithm_type="MANUAL",
    )
    kind = "FRACTIONAL" if fractional else "BINARY"
    return hd.seg.Segmentation(
        source_images=source,
        pixel_array=mask,
        segmentation_type=kind,
        segment_descriptions=[described],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="a",
        manufacturer_model_name="b",
        software_versions="c",
        device_serial_number="d",
    )


@pytest.mark.parametrize("fractional", [False, True])
def test_a_dicom_seg_comes_back_where_it_was_drawn(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study, fractional: bool
) -> None:
    slices = exam(dicom_slice, "1.2.3", 0)
    for k, ds in enumerate(slices):
        save(ds, tmp_path / f"{9 - k}.dcm")
    mask = np.zeros((4, 3, 4), dtype=np.float64 if fractional else np.uint8)
    mask[1, 2, 3] = mask[2, 0, 1] = 1
    save(segment(slices, mask, fractional), tmp_path / "seg.dcm")
    found = find(tmp_path, volumes)
    assert [len(c.mask_files) for c in found.cases] == [1]
    read = dicom.load_mask(found.cases[0], volumes)
    # (slice, row, column) -> (column, row, slice).
    assert np.argwhere(read.array).tolist() == [[1, 0, 2], [3, 2, 1]]
    assert set(np.unique(read.array)) == {0, 1}
    image = dicom.load(found.cases[0], volumes)
    assert read.array.shape == image.array.shape[1:]


def test_series_with_segmentations_become_a_cohort(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Callable[..., Study]
) -> None:
    for patient in range(3):
        slices = exam(dicom_slice, f"1.2.{patient}", patient)
        for k, ds in enumerate(slices):
            save(ds, tmp_path / str(patient) / f"{k}.dcm")
        mask = np.zeros((4, 3, 4), dtype=np.uint8)
        mask[patient, 0, 0] = 1
        if patient < 2:
            save(segment(slices, mask), tmp_path / "seg" / f"{patient}.dcm")
    rule = study(
        "segmentation",
        image=ImageInput(dimensions=3, size=[4, 3, 4], orientation="LPS", intensity="none"),
        quality=Quality(max_quarantined=0.5),
    )
    source = DataSource(format="dicom", path=tmp_path)
    cohort = build_cohort(source, rule, cache=Cache(path=tmp_path / "cache"))
    assert [q.reason for q in cohort.quarantined] == ["mask_missing"]
    found = sorted(np.argwhere(np.asarray(m)).tolist()[0] for m in cohort.targets)  # type: ignore[union-attr]
    assert found == [[0, 0, 0], [0, 0, 1]]
    assert np.asarray(cohort.inputs).shape == (2, 1, 4, 3, 4)


def test_a_seg_of_one_slice_serves_a_study_in_two_dimensions(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    slices = exam(dicom_slice, "1.2.3", 0)
    for k, ds in enumerate(slices):
        save(ds, tmp_path / f"{k}.dcm")
    mask = np.zeros((4, 3, 4), dtype=np.uint8)
    mask[1, 2, 3] = mask[2, 0, 0] = 1
    save(segment(slices, mask), tmp_path / "seg.dcm")
    drawn = {}
    for ref in find(tmp_path, planes).cases:
        drawn[ref.files[0].name] = np.argwhere(dicom.load_mask(ref, planes).array).tolist()
    assert drawn == {"0.dcm": [], "1.dcm": [[2, 3]], "2.dcm": [[0, 0]], "3.dcm": []}


def test_a_seg_on_another_grid_is_refused(
    tmp_path: Path, dicom_slice: Make, save: Save, volumes: Study
) -> None:
    from medfl.client.readers.dicom_geometry import Place, on_grid, plane_affine

    place = Place((0.0, 0.0, 0.0), (1, 0, 0, 0, 1, 0), (1.0, 1.0))
    layer = np.ones((1, 2, 2), dtype=np.uint8)
    affine = plane_affine(place, np.array([0.0, 0.0, 1.0]))
    between = Place((0.5, 0.0, 0.0), place.orientation, place.spacing)
    outside = Place((0.0, 0.0, 7.0), place.orientation, place.spacing)
    assert on_grid(layer, [place], affine, (2, 2, 3))[..., 0].sum() == 4
    for other in (between, outside):
        with pytest.raises(CaseError, match="mask_geometry"):
            on_grid(layer, [other], affine, (2, 2, 3))
    with pytest.raises(CaseError, match="mask_overlap"):
        on_grid(np.concatenate([layer, 2 * layer]), [place, place], affine, (2, 2, 3))
    # Empty layers that cover another place do not say that nothing is here.
    with pytest.raises(CaseError, match="another place"):
        on_grid(0 * layer, [outside], affine, (2, 2, 3))


@pytest.mark.slow
def test_a_real_scanner_with_interleaved_slices(
    tmp_path: Path, public_data: Callable[[str], Path], volumes: Study
) -> None:
    seen: set[tuple[float, ...]] = set()
    for file in sorted(public_data("dicom_mr_two_vendors").rglob("axial*.dcm")):
        position = tuple(pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient)
        if position not in seen:
            seen.add(position)
            shutil.copy(file, tmp_path / f"{99 - len(seen)}.dcm")
    picture = only(tmp_path, volumes)
    assert picture.array.shape == (1, 64, 64, 15)
    assert picture.spacing_mm == pytest.approx((3.75, 3.75, 5.0))
    assert picture.affine is not None
    assert np.linalg.det(picture.affine[:3, :3]) > 0


@pytest.mark.slow
def test_time_series_and_mosaics_of_real_scanners_are_explained(
    public_data: Callable[[str], Path], volumes: Study
) -> None:
    found = find(public_data("dicom_mr_two_vendors"), volumes)
    assert not found.quarantined
    reasons = []
    for ref in found.cases:
        with pytest.raises(CaseError) as caught:
            dicom.load(ref, volumes)
        reasons.append(caught.value.reason)
    assert sorted(reasons) == ["mosaic"] * 4 + ["several_volumes"]
