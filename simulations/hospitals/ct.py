"""The CT folder of one hospital: series of DICOM slices, NIfTI masks and the list of cases."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from medfl.common.seeds import derive
from medfl.simulations.hospitals import anatomy, damage, dicom, tables
from medfl.simulations.hospitals.profiles import Ct, Hospital, Table


@dataclass(frozen=True, slots=True)
class Scan:
    """One acquired volume, in the order slices, rows, columns.

    stored: values as in the files. mask: classes. first_mm: middle of voxel (0, 0, 0) in DICOM
    patient axes. steps_mm: (3, 3) rows: from one slice, row, column to the next.
    """

    stored: NDArray[np.integer]
    mask: NDArray[np.uint8]
    first_mm: NDArray[np.float64]
    steps_mm: NDArray[np.float64]

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4): slice, row, column index -> RAS+ millimetres."""
        lps = np.eye(4)
        lps[:3, :3], lps[:3, 3] = self.steps_mm.T, self.first_mm
        return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps)


def write(hospital: Hospital, folder: Path, *, seed: int, small: bool) -> Table:
    """Write images/, masks/ and the table, which is returned; `Ct.damage` says what is wrong."""
    cases = hospital.ct.small_cases if small else hospital.ct.cases
    numbers = _patients(hospital.ct, cases)
    ids = tables.patient_numbers(hospital.number, cases, derive(seed, hospital.name, "ct"))
    rows = [
        _write_case(hospital, folder, seed, case, patient, ids[patient])
        for case, patient in enumerate(numbers)
    ]
    for what, case in hospital.ct.damage:
        rows += DAMAGE[what](folder, rows[case])
    tables.write(hospital.ct.table, folder, rows)
    return hospital.ct.table


def acquire(hospital: Hospital, seed: int, patient: int, case: int) -> Scan:
    """What this hospital's scanner makes of a patient; the same arguments give the same voxels."""
    ct = hospital.ct
    shape, centre, steps = _geometry(hospital, derive(seed, hospital.name, "table", case))
    body = anatomy.draw_patient(
        np.random.default_rng(derive(seed, hospital.name, "anatomy", patient))
    )
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    points = (index - (np.array(shape) - 1) / 2) @ steps
    hu, mask = anatomy.abdomen(body, points)
    noise = np.random.default_rng(derive(seed, hospital.name, "noise", case))
    hu = np.clip(hu + noise.normal(0, ct.noise_hu, shape), -1024, 2000)
    stored = np.round((hu - ct.intercept) / ct.slope).astype(np.int16 if ct.signed else np.uint16)
    if ct.padding is not None:
        stored[_outside_the_round_view(shape)] = ct.padding
    first = np.round(centre - (np.array(shape) - 1) / 2 @ steps, 2)
    return Scan(stored, mask, first, steps)


def _patients(ct: Ct, cases: int) -> list[int]:
    """Number of the patient of each case; patient 0 came several times."""
    returned = {case for what, case in ct.damage if what == "patient_returns"}
    return [0 if case in returned else case for case in range(cases)]


def _geometry(
    hospital: Hospital, seed: int
) -> tuple[tuple[int, int, int], NDArray[np.float64], NDArray[np.float64]]:
    """Shape, middle of the scan and steps, in mm in DICOM patient axes (PS3.3 C.7.6.2.1.1)."""
    ct = hospital.ct
    row, column = np.array(ct.axes)
    between, down, across = ct.spacing_mm
    steps = np.stack([np.cross(row, column) * between, column * down, row * across])
    rng = np.random.default_rng(seed)
    centre = np.array([0.0, -160.0, -700.0]) + np.round(rng.uniform(-30, 30, 3), 1)
    return ct.shape, centre, steps


def _outside_the_round_view(shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    rows, columns = np.meshgrid(
        np.linspace(-1, 1, shape[1]), np.linspace(-1, 1, shape[2]), indexing="ij"
    )
    return np.broadcast_to(np.hypot(rows, columns) > 1, shape)


def _write_case(
    hospital: Hospital, folder: Path, seed: int, case: int, patient: int, number: str
) -> tables.Row:
    rng = np.random.default_rng(derive(seed, hospital.name, "ct person", patient))
    person = dicom.draw_person(rng, number, hospital.families)
    date = f"2025{1 + case % 12:02d}{1 + case % 28:02d}"
    exam = dicom.Exam((seed, hospital.name, "ct", case), person, hospital.institution, date)
    scan = acquire(hospital, seed, patient, case)
    case_id = f"{2500100 + 7 * case}"
    image, mask = f"{number}/{case_id}", f"{case_id}.nii.gz"
    _write_series(hospital.ct, scan, exam, folder / "images" / image, derive(seed, "names", case))
    write_mask(folder / "masks" / mask, scan.mask, scan.affine, hospital.ct.canonical_mask)
    return {"patient": number, "case": case_id, "image": image, "mask": mask}


def _write_series(ct: Ct, scan: Scan, exam: dicom.Exam, folder: Path, seed: int) -> None:
    """One file a slice, under names whose order says nothing about the order in the body."""
    slices = len(scan.stored)
    names = np.random.default_rng(seed).permutation(slices)
    for k in range(slices):
        instance = slices - k if ct.downwards else k + 1
        ds = dicom.common(exam, CTImageStorage, "ct", instance)
        _describe(ds, ct, exam, scan.first_mm + k * scan.steps_mm[0])
        dicom.put_pixels(ds, scan.stored[k], ct.bits, "MONOCHROME2")
        if ct.padding is not None:
            ds.add_new("PixelPaddingValue", "SS" if ct.signed else "US", ct.padding)
        dicom.save(ds, folder / f"IM{names[k]:04d}{ct.suffix}", ct.syntax)


def _describe(ds: Dataset, ct: Ct, exam: dicom.Exam, place: NDArray[np.float64]) -> None:
    """Frame of Reference, Image Plane and CT Image modules (PS3.3 C.7.4.1, C.7.6.2, C.8.2.1)."""
    axial = ct.axes[1][2] == 0
    ds.Modality = "CT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"] if axial else ["DERIVED", "SECONDARY", "MPR"]
    ds.SeriesDescription = "Abdomen portal venous"
    ds.BodyPartExamined, ds.PatientPosition = "ABDOMEN", "HFS"
    ds.FrameOfReferenceUID = dicom.uid(*exam.key, "frame")
    ds.PositionReferenceIndicator = ""
    ds.ImagePositionPatient = [f"{v:.2f}" for v in place]
    ds.ImageOrientationPatient = [f"{v:g}" for axis in ct.axes for v in axis]
    ds.PixelSpacing = [f"{v:g}" for v in ct.spacing_mm[1:]]
    ds.SliceThickness = f"{ct.thickness_mm:g}"
    ds.RescaleSlope, ds.RescaleIntercept = f"{ct.slope:g}", f"{ct.intercept:g}"
    ds.RescaleType = "HU"
    ds.WindowCenter, ds.WindowWidth = "50", "350"
    ds.KVP, ds.AcquisitionNumber = "120", 1


def write_mask(
    path: Path, mask: NDArray[np.uint8], affine: NDArray[np.float64], canonical: bool
) -> None:
    """A NIfTI mask. mask: slices, rows, columns; stored as columns, rows, slices or as RAS+."""
    order = affine[:, [2, 1, 0, 3]]
    image = nib.Nifti1Image(  # type: ignore[no-untyped-call]
        np.ascontiguousarray(mask.transpose(2, 1, 0)), order
    )
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    if canonical:
        image = nib.as_closest_canonical(image)  # type: ignore[no-untyped-call]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def _slice_of(folder: Path, row: tables.Row) -> Path:
    """A file from the middle of the sorted names."""
    files = sorted((folder / "images" / row["image"]).iterdir())
    return files[len(files) // 2]


def _truncated_slice(folder: Path, row: tables.Row) -> list[tables.Row]:
    damage.truncate(_slice_of(folder, row))
    return []


def _slice_missing(folder: Path, row: tables.Row) -> list[tables.Row]:
    """A slice from inside the body is lost; the outer ones would leave no gap."""
    files = sorted((folder / "images" / row["image"]).iterdir())
    numbers = {int(dcmread(f, specific_tags=["InstanceNumber"]).InstanceNumber): f for f in files}
    numbers[len(files) // 2].unlink()
    return []


def _empty_slice(folder: Path, row: tables.Row) -> list[tables.Row]:
    _slice_of(folder, row).write_bytes(b"")
    return []


def _stray_text_file(folder: Path, row: tables.Row) -> list[tables.Row]:
    damage.write_text(folder / "images" / row["image"] / "notes.dcm")
    return []


def _duplicate_series(folder: Path, row: tables.Row) -> list[tables.Row]:
    """The same files once more, as an archive keeps them after a second transfer."""
    source, copy = folder / "images" / row["image"], f"{row['image']}-2"
    target = folder / "images" / copy
    shutil.copytree(source, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return [{**row, "case": f"{row['case']}-2", "image": copy}]


def _mask_of_another_shape(folder: Path, row: tables.Row) -> list[tables.Row]:
    """The mask loses three planes at one end, as when it was drawn on another reconstruction."""
    path = folder / "masks" / row["mask"]
    whole = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(whole.slicer[:, :, :-3].to_bytes(), mtime=0))
    return []


def _mask_missing(folder: Path, row: tables.Row) -> list[tables.Row]:
    (folder / "masks" / row["mask"]).unlink()
    row["mask"] = ""
    return []


DAMAGE: dict[str, Callable[[Path, tables.Row], list[tables.Row]]] = {
    "patient_returns": lambda folder, row: [],
    "truncated_slice": _truncated_slice,
    "slice_missing": _slice_missing,
    "empty_slice": _empty_slice,
    "stray_text_file": _stray_text_file,
    "duplicate_series": _duplicate_series,
    "mask_of_another_shape": _mask_of_another_shape,
    "mask_missing": _mask_missing,
}
