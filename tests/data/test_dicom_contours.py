"""Masks from RT Structure Sets: contours in mm to voxels of the image, with holes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medfl.client.data.cohort import examine
from medfl.client.readers import dicom
from medfl.client.readers.dicom_contours import filled_polygon
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import ImageInput, Study

Make = Callable[..., Dataset]
Save = Callable[[Dataset, Path], Path]
Studies = Callable[..., Study]
Points = Sequence[tuple[float, float]]
CLASSES = ("background", "liver", "tumour")
# Columns 1 to 5 and rows 1 to 4: 20 voxels. Within: columns 3 and 4, rows 2 and 3: 4 voxels.
OUTER = ((0.6, 0.6), (5.4, 0.6), (5.4, 4.4), (0.6, 4.4))
INNER = ((2.6, 1.6), (4.4, 1.6), (4.4, 3.4), (2.6, 3.4))
BOX = {(c, r) for c in range(1, 6) for r in range(1, 5)}
HOLE = {(c, r) for c in (3, 4) for r in (2, 3)}


def image(folder: Path, make: Make, save: Save) -> None:
    """Three slices 5 mm apart; 8 rows 2 mm apart, 10 columns 0.5 mm apart."""
    for k in range(3):
        pixels = np.arange(80, dtype=np.int16).reshape(8, 10) + k
        ds = make(pixels, position=(10.0, 20.0, 30.0 + 5 * k), FrameOfReferenceUID="1.2.9")
        save(ds, folder / f"{k}.dcm")


def contour(points: Points, slice_: float, kind: str = "CLOSED_PLANAR") -> Dataset:
    """points: (column, row) of the image, written in mm as the standard says."""
    ds = Dataset()
    ds.ContourGeometricType = kind
    ds.NumberOfContourPoints = len(points)
    ds.ContourData = [
        f"{v:.3f}" for c, r in points for v in (10 + 0.5 * c, 20 + 2 * r, 30 + 5 * slice_)
    ]
    return ds


def structures(
    path: Path, save: Save, regions: dict[str, list[Dataset]], frame: str = "1.2.9"
) -> Path:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "p1", "1.2", "1.2.77"
    ds.Modality = "RTSTRUCT"
    series, studied, of_frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = "1.2.3"
    studied.RTReferencedSeriesSequence = [series]
    of_frame.FrameOfReferenceUID = frame
    of_frame.RTReferencedStudySequence = [studied]
    ds.ReferencedFrameOfReferenceSequence = [of_frame]
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    ds.RTROIObservationsSequence = []
    # Numbers in reverse, for they mean nothing.
    for number, (name, contours) in enumerate(reversed(regions.items()), start=1):
        region, drawn, seen = Dataset(), Dataset(), Dataset()
        region.ROINumber = drawn.ReferencedROINumber = seen.ReferencedROINumber = number
        region.ROIName, region.ReferencedFrameOfReferenceUID = name, frame
        seen.RTROIInterpretedType = "EXTERNAL" if name == "BODY" else "ORGAN"
        drawn.ContourSequence = contours
        ds.StructureSetROISequence.append(region)
        ds.ROIContourSequence.append(drawn)
        ds.RTROIObservationsSequence.append(seen)
    return save(ds, path)


def rule(study: Studies, label_map: dict[str, str] | None = None, dimensions: int = 3) -> Study:
    size = [10, 8, 3] if dimensions == 3 else [8, 10]
    made = ImageInput(dimensions=dimensions, size=size, orientation="LPS", intensity="none")
    return study("segmentation", CLASSES, label_map, image=made)


def drawn(folder: Path, studied: Study) -> NDArray[np.generic]:
    found = dicom.find(DataSource(format="dicom", path=folder), studied)
    return dicom.load_mask(found.cases[0], studied).array


def voxels(mask: NDArray[np.generic], slice_: int, number: int = 1) -> set[tuple[int, ...]]:
    return {tuple(int(i) for i in at) for at in np.argwhere(mask[:, :, slice_] == number)}


def test_a_triangle_holds_the_voxels_whose_centres_lie_inside() -> None:
    # Columns and rows from 1 whose sum is below 5.9: 4 + 3 + 2 + 1 voxels.
    inside = filled_polygon(np.array([[0.5, 0.5], [5.4, 0.5], [0.5, 5.4]]), (8, 10))
    assert [[int(c) for c in np.flatnonzero(row)] for row in inside] == [
        [],
        [1, 2, 3, 4],
        [1, 2, 3],
        [1, 2],
        [1],
        [],
        [],
        [],
    ]


def test_a_contour_lands_on_its_voxels_and_one_within_it_is_a_hole(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    image(tmp_path, dicom_slice, save)
    regions = {"liver": [contour(OUTER, 1), contour(INNER, 1)], "tumour": [contour(OUTER, 2)]}
    structures(tmp_path / "rs.dcm", save, regions)
    mask = drawn(tmp_path, rule(study))
    assert mask.shape == (10, 8, 3)
    assert voxels(mask, 0) == set()
    assert voxels(mask, 1) == BOX - HOLE
    assert voxels(mask, 2, 2) == BOX


@pytest.mark.parametrize("kinds", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
@pytest.mark.parametrize("order", [1, -1])
def test_an_island_in_a_hole_is_there_in_whatever_order_it_was_drawn(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies, kinds: str, order: int
) -> None:
    island = ((2.7, 1.7), (3.3, 1.7), (3.3, 2.3), (2.7, 2.3))  # column 3, row 2
    image(tmp_path, dicom_slice, save)
    several = [contour(points, 1, kinds) for points in (OUTER, INNER, island)][::order]
    structures(tmp_path / "rs.dcm", save, {"liver": several})
    assert voxels(drawn(tmp_path, rule(study)), 1) == (BOX - HOLE) | {(3, 2)}


def test_a_hole_on_a_channel_is_a_hole(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    image(tmp_path, dicom_slice, save)
    # Round the outside, in by the corner, round the hole and out again: one contour.
    keyhole = (*OUTER, OUTER[0], INNER[0], *reversed(INNER), OUTER[0])
    structures(tmp_path / "rs.dcm", save, {"liver": [contour(keyhole, 1)]})
    assert voxels(drawn(tmp_path, rule(study)), 1) == BOX - HOLE


def test_contours_serve_single_slices_and_whole_cohorts(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    image(tmp_path, dicom_slice, save)
    structures(tmp_path / "rs.dcm", save, {"liver": [contour(INNER, 1)]})
    flat = rule(study, dimensions=2)
    found = dicom.find(DataSource(format="dicom", path=tmp_path), flat)
    seen = {
        r.files[0].name: int(np.asarray(dicom.load_mask(r, flat).array).sum()) for r in found.cases
    }
    assert seen == {"0.dcm": 0, "1.dcm": 4, "2.dcm": 0}

    cohort = examine(DataSource(format="dicom", path=tmp_path), rule(study), cache=None).cohort
    assert voxels(np.asarray(cohort.targets[0]), 1) == HOLE
    assert not cohort.quarantined


def test_regions_are_known_by_name_and_unknown_ones_are_declared(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    image(tmp_path, dicom_slice, save)
    whole = ((-0.4, -0.4), (9.4, -0.4), (9.4, 7.4), (-0.4, 7.4))
    regions = {
        "Leber": [contour(OUTER, 1)],
        "PTV": [contour(INNER, 1)],
        "BODY": [contour(whole, 1)],
    }
    structures(tmp_path / "rs.dcm", save, regions)
    with pytest.raises(CaseError, match="segment_unknown"):
        drawn(tmp_path, rule(study, {"Leber": "liver"}))
    assert voxels(drawn(tmp_path, rule(study, {"Leber": "liver", "*": "background"})), 1) == BOX


@pytest.mark.parametrize(
    ("contours", "reason"),
    [
        ([contour(OUTER, 1, "OPEN_PLANAR")], "contours"),
        ([contour(OUTER[:2], 1)], "contours"),
        ([contour(OUTER, 0.5)], "contours"),
        ([contour(OUTER, 1), contour([(c + 2, r) for c, r in OUTER], 1)], "contours"),
        ([contour(OUTER, 7)], "mask_geometry"),
        ([contour([(c + 20, r) for c, r in OUTER], 1)], "mask_geometry"),
    ],
)
def test_contours_that_are_no_region_of_the_image_are_refused(
    tmp_path: Path,
    dicom_slice: Make,
    save: Save,
    study: Studies,
    contours: list[Dataset],
    reason: str,
) -> None:
    image(tmp_path, dicom_slice, save)
    structures(tmp_path / "rs.dcm", save, {"liver": contours})
    with pytest.raises(CaseError) as caught:
        drawn(tmp_path, rule(study))
    assert caught.value.reason == reason


def test_two_classes_do_not_share_a_voxel_nor_two_frames_a_place(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    image(tmp_path, dicom_slice, save)
    both: dict[str, Any] = {"liver": [contour(OUTER, 1)], "tumour": [contour(INNER, 1)]}
    structures(tmp_path / "rs.dcm", save, both)
    with pytest.raises(CaseError, match="mask_overlap"):
        drawn(tmp_path, rule(study))
    structures(tmp_path / "rs.dcm", save, {"liver": [contour(OUTER, 1)]}, frame="1.2.8")
    with pytest.raises(CaseError, match="mask_frame"):
        drawn(tmp_path, rule(study))


def test_contours_that_belong_to_no_image_are_named(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    image(tmp_path, dicom_slice, save)
    file = structures(tmp_path / "rs.dcm", save, {"liver": [contour(OUTER, 1)]})
    from pydicom import dcmread

    ds = dcmread(file)
    ds.ReferencedFrameOfReferenceSequence = []
    ds.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.8"
    ds.save_as(file)
    examined = examine(DataSource(format="dicom", path=tmp_path), rule(study), cache=None)
    assert sorted(q.reason for q in examined.cohort.quarantined) == ["mask_alone", "mask_missing"]
    assert "RTSTRUCT" in examined.faults[-1]
