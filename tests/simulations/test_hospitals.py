"""The made-up hospitals: files and faults as promised, the same bytes for the same seed."""

from __future__ import annotations

import csv
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from medfl.client.data.cohort import examine
from medfl.common.site import Site, load_site
from medfl.common.study import load_study
from medfl.simulations.hospitals import anatomy, ct, dicom, make_hospitals, records, xray
from medfl.simulations.hospitals.profiles import HOSPITALS, Hospital

STUDIES = Path(__file__).parents[2] / "simulations" / "studies"
BY_NAME = {h.name: h for h in HOSPITALS}
CT_TYPE_1 = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality "
    "ImageType PixelSpacing ImageOrientationPatient ImagePositionPatient RescaleSlope "
    "RescaleIntercept RescaleType SamplesPerPixel PhotometricInterpretation Rows Columns "
    "BitsAllocated BitsStored HighBit PixelRepresentation PixelData"
).split()
TYPE_2 = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber "
    "ReferringPhysicianName StudyID SeriesNumber Manufacturer InstanceNumber"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hospitals")
    make_hospitals(root, small=True)
    return root


def site_of(folder: Path, kind: str, hospital: Hospital) -> Site:
    return load_site(folder / kind / hospital.name / "site.toml")


def rows_of(site: Site) -> list[dict[str, str]]:
    """The table under the study's names."""
    assert site.data.table is not None
    with site.data.table.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter=site.data.delimiter or ","))
    header = site.data.header or lines.pop(0)
    keys = {name: key for key, name in (site.data.columns or {}).items()}
    return [{keys[n]: v for n, v in zip(header, line, strict=True)} for line in lines]


def series(folder: Path) -> list[Any]:
    """Slices sorted along the normal of their plane."""
    slices = [dcmread(f) for f in folder.iterdir()]
    row, column = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(row, column)
    return sorted(slices, key=lambda s: float(normal @ np.array(s.ImagePositionPatient, float)))


def world_of(slices: list[Any]) -> NDArray[np.float64]:
    """(4, 4): slice, row, column -> RAS+ mm, from the headers alone (PS3.3 C.7.6.2.1.1)."""
    first, last = (np.array(s.ImagePositionPatient, float) for s in (slices[0], slices[-1]))
    row, column = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    down, across = map(float, slices[0].PixelSpacing)
    lps = np.eye(4)
    lps[:3] = np.column_stack(
        [(last - first) / (len(slices) - 1), column * down, row * across, first]
    )
    return np.diag([-1.0, -1, 1, 1]) @ lps


def digests(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def readable(path: Path) -> bool:
    try:
        return dcmread(path).pixel_array.size > 0
    except (InvalidDicomError, EOFError, ValueError, AttributeError):
        return False


@pytest.mark.slow
def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(
    folder: Path, tmp_path: Path
) -> None:
    make_hospitals(tmp_path / "again", small=True)
    make_hospitals(tmp_path / "again", small=True)  # Over the files of the first run.
    make_hospitals(tmp_path / "other", small=True, seed=1)
    first, other = digests(folder), digests(tmp_path / "other")
    assert digests(tmp_path / "again") == first
    same = [Path(f).name for f in first if f.endswith((".dcm", ".gz")) and first[f] == other.get(f)]
    assert sorted(same) == ["2600149.dcm", "2600177.dcm"]  # The empty file and the text file.


def test_every_site_file_is_valid_and_one_hospital_asks_for_privacy(folder: Path) -> None:
    for kind, epsilon in (("segmentation", None), ("classification", None), ("risk", 8.0)):
        sites = [site_of(folder, kind, h) for h in HOSPITALS]
        assert [s.privacy.epsilon if s.privacy else None for s in sites] == [None, epsilon, None]
        if kind == "risk":
            assert all(s.data.path.is_file() for s in sites)
        else:
            assert all(s.data.path.is_dir() and s.data.table for s in sites)


def test_records_are_drawn_alike_at_every_hospital_but_for_who_its_patients_are() -> None:
    """The outcome follows from the fields in one way, which is why hospitals can learn together."""
    ages, shares = {}, {}
    for hospital in HOSPITALS:
        values, outcomes = records.draw(hospital, 0, 4000)
        assert values.shape == (4000, len(records.FIELDS))
        ages[hospital.name], shares[hospital.name] = values[:, 0].mean(), outcomes.mean()
        creatinine = values[:, list(records.FIELDS).index("creatinine")]
        assert creatinine[outcomes].mean() > creatinine[~outcomes].mean() + 0.2
    # 66 years and half, no and minus seven tenths of a standard deviation of 13 years.
    assert ages["st-marien"] == pytest.approx(66 + 6.5, abs=1)
    assert ages["riverside"] == pytest.approx(66, abs=1)
    assert ages["hopital-nord"] == pytest.approx(66 - 9.1, abs=1)
    assert all(0.3 < share < 0.6 for share in shares.values())


@pytest.mark.parametrize("name", ["demo_segmentation", "demo_classification", "demo_risk"])
def test_the_demo_studies_are_valid_and_leave_the_sites_to_the_folder(name: str) -> None:
    assert load_study(STUDIES / f"{name}.toml").simulation is None


@pytest.mark.parametrize("hospital", HOSPITALS, ids=lambda h: h.name)
def test_a_series_sorted_by_position_is_the_volume_that_was_acquired(
    folder: Path, hospital: Hospital
) -> None:
    site = site_of(folder, "segmentation", hospital)
    slices = series(site.data.path / rows_of(site)[0]["image"])
    volume = np.stack([s.pixel_array for s in slices]).astype(float)
    hu = volume * float(slices[0].RescaleSlope) + float(slices[0].RescaleIntercept)
    scan = ct.acquire(hospital, 0, 0, 0)
    np.testing.assert_array_equal(volume, scan.stored)
    np.testing.assert_allclose(world_of(slices), scan.affine, atol=0.01)
    inside = hu[scan.mask == anatomy.LIVER]
    assert 80 < inside.mean() < 130


@pytest.mark.parametrize("hospital", HOSPITALS, ids=lambda h: h.name)
def test_mask_and_series_agree_in_the_patients_space(folder: Path, hospital: Hospital) -> None:
    site = site_of(folder, "segmentation", hospital)
    row = rows_of(site)[0]
    assert site.data.masks is not None
    mask: Any = nib.load(site.data.masks / row["mask"])  # type: ignore[attr-defined]
    scan = ct.acquire(hospital, 0, 0, 0)
    places = np.argwhere(np.asarray(mask.dataobj) > 0)
    world = nib.affines.apply_affine(mask.affine, places)
    slices = series(site.data.path / row["image"])
    voxels = nib.affines.apply_affine(np.linalg.inv(world_of(slices)), world)
    np.testing.assert_allclose(voxels, np.round(voxels), atol=0.02)
    found = np.zeros(scan.mask.shape, bool)
    found[tuple(np.round(voxels).astype(int).T)] = True
    np.testing.assert_array_equal(found, scan.mask > 0)


def test_the_liver_is_on_the_patients_right() -> None:
    for hospital in HOSPITALS:
        scan = ct.acquire(hospital, 0, 0, 0)
        centre = (np.array(scan.mask.shape) - 1) / 2
        liver = np.argwhere(scan.mask > 0).mean(axis=0)
        assert (scan.affine[:3, :3] @ (liver - centre))[0] > 30  # RAS+: x grows to the right.


def test_hospitals_scan_the_same_body_differently() -> None:
    patient = anatomy.draw_patient(np.random.default_rng(5))
    points = np.stack(np.meshgrid(*[np.linspace(-150, 150, 30)] * 3, indexing="ij"), -1)
    hu, mask = anatomy.abdomen(patient, points)
    again, _ = anatomy.abdomen(patient, points[3:9])
    np.testing.assert_array_equal(hu[3:9], again)
    assert hu.min() == anatomy.AIR
    assert hu.max() == anatomy.BONE
    assert 0.02 < (mask > 0).mean() < 0.1


@pytest.mark.parametrize("hospital", HOSPITALS, ids=lambda h: h.name)
def test_ct_slices_have_what_the_standard_requires(folder: Path, hospital: Hospital) -> None:
    site = site_of(folder, "segmentation", hospital)
    files = sorted((site.data.path / rows_of(site)[0]["image"]).iterdir())
    slices = [dcmread(f) for f in files]
    for ds in slices:
        assert all(ds.get(name) not in (None, "") for name in CT_TYPE_1), ds
        assert all(name in ds for name in TYPE_2)
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert ds.file_meta.TransferSyntaxUID == hospital.ct.syntax
        assert ds.SOPInstanceUID.startswith("2.25.")
        assert ds.SOPInstanceUID.is_valid
    assert len({s.SOPInstanceUID for s in slices}) == len(slices)
    assert len({s.SeriesInstanceUID for s in slices}) == 1
    heights = [
        float(s.ImagePositionPatient[1 if hospital.name == "hopital-nord" else 2]) for s in slices
    ]
    assert heights != sorted(heights)
    assert heights != sorted(heights, reverse=True)


@pytest.mark.parametrize("hospital", HOSPITALS, ids=lambda h: h.name)
def test_xrays_decode_to_what_was_exposed(folder: Path, hospital: Hospital) -> None:
    site = site_of(folder, "classification", hospital)
    rows = rows_of(site)
    opacity = rows[0]["label"] == hospital.xray.labels[1]
    ds = dcmread(site.data.path / rows[0]["image"])
    np.testing.assert_array_equal(ds.pixel_array, xray.expose(hospital, 0, 0, opacity))
    assert ds.PatientID == rows[0]["patient"]
    assert ds.PhotometricInterpretation == hospital.xray.photometric
    assert all(name in ds for name in TYPE_2)


def test_hospitals_differ_in_format_as_promised() -> None:
    assert len({h.ct.syntax for h in HOSPITALS}) == 3
    assert len({h.ct.spacing_mm for h in HOSPITALS}) == 3
    assert {h.ct.signed for h in HOSPITALS} == {True, False}
    assert [h.xray.positive for h in HOSPITALS] == [0.3, 0.5, 0.7]
    assert [h.xray.photometric for h in HOSPITALS].count("MONOCHROME1") == 1
    assert {h.xray.bits > 8 for h in HOSPITALS} == {True, False}


def test_labels_are_as_balanced_as_promised() -> None:
    shares = [xray.draw_labels(h, 0, h.xray.images).mean() for h in HOSPITALS]
    assert shares == [0.3, 0.5, 0.7]


@pytest.mark.parametrize(("name", "sign"), [("riverside", 1), ("hopital-nord", -1)])
def test_an_opacity_changes_a_lung_and_nothing_else(name: str, sign: int) -> None:
    clear, opaque = (xray.expose(BY_NAME[name], 0, 3, o).astype(int) for o in (False, True))
    change = sign * (opaque - clear)  # MONOCHROME1: dense tissue is stored as a low value.
    assert change.min() >= 0
    assert 0.01 < (change > 0.02 * 2 ** BY_NAME[name].xray.bits).mean() < 0.25


def test_the_promised_faults_of_ct_are_there(folder: Path) -> None:
    german, english, french = (site_of(folder, "segmentation", h) for h in HOSPITALS)
    rows = rows_of(german)
    assert len({r["patient"] for r in rows[:3]}) == 1
    assert len({series(german.data.path / r["image"])[0].StudyInstanceUID for r in rows[:3]}) == 3
    assert [readable(f) for f in slices_of(german, rows[4])].count(False) == 1
    steps = [float(s.ImagePositionPatient[2]) for s in series(german.data.path / rows[6]["image"])]
    assert sorted(set(np.round(np.diff(steps), 2))) == [10.0, 20.0]
    rows = rows_of(english)
    assert [f.stat().st_size for f in slices_of(english, rows[6])].count(0) == 1
    copy, original = (
        sorted(f.read_bytes() for f in slices_of(english, r)) for r in (rows[-1], rows[3])
    )
    assert copy == original
    assert rows[-1]["patient"] == rows[3]["patient"]
    rows = rows_of(french)
    assert french.data.masks is not None
    cut, whole = (nib.load(french.data.masks / rows[n]["mask"]) for n in (2, 0))  # type: ignore[attr-defined]
    assert cut.shape != whole.shape
    assert rows[5]["mask"] == ""
    assert "notes.dcm" in {f.name for f in slices_of(french, rows[6])}


def slices_of(site: Site, row: dict[str, str]) -> list[Path]:
    return sorted((site.data.path / row["image"]).iterdir())


def test_the_promised_faults_of_xrays_are_there(folder: Path) -> None:
    german, english, french = (site_of(folder, "classification", h) for h in HOSPITALS)
    rows = rows_of(german)
    broken = [n for n, r in enumerate(rows) if not readable(german.data.path / r["image"])]
    assert broken == [5, 11]
    with pytest.raises(InvalidDicomError):
        dcmread(german.data.path / rows[11]["image"])
    rows = rows_of(english)
    assert (english.data.path / rows[7]["image"]).stat().st_size == 0
    pair = [(english.data.path / rows[n]["image"]).read_bytes() for n in (12, -1)]
    assert pair[0] == pair[1]
    rows = rows_of(french)
    assert [n for n, r in enumerate(rows) if not r["label"]] == [9]
    for site in (german, english, french):
        patients = [r["patient"] for r in rows_of(site)]
        assert len(set(patients)) < len(patients)


REASONS = {
    ("segmentation", "st-marien"): {"dicom_truncated", "slice_gap"},
    ("segmentation", "riverside"): {"duplicate", "not_dicom"},
    ("segmentation", "hopital-nord"): {"mask_geometry", "mask_missing", "not_dicom"},
    ("classification", "st-marien"): {"dicom_truncated", "not_dicom"},
    ("classification", "riverside"): {"duplicate", "not_dicom"},
    ("classification", "hopital-nord"): {"label_missing"},
}
USABLE = {
    ("segmentation", "st-marien"): 6,
    ("segmentation", "riverside"): 15,
    ("segmentation", "hopital-nord"): 6,
    ("classification", "st-marien"): 18,
    ("classification", "riverside"): 23,
    ("classification", "hopital-nord"): 19,
}


@pytest.mark.parametrize(("kind", "name"), REASONS)
def test_a_client_finds_the_faults_and_can_still_train(folder: Path, kind: str, name: str) -> None:
    site = site_of(folder, kind, BY_NAME[name])
    examined = examine(site.data, load_study(STUDIES / f"demo_{kind}.toml"), cache=None)
    cohort = examined.cohort
    assert examined.faults == ()
    assert {q.reason for q in cohort.quarantined} == REASONS[kind, name]
    assert len(cohort.cases) == USABLE[kind, name]
    sides: dict[str, set[str]] = {}
    for case in cohort.cases:
        sides.setdefault(case.patient, set()).add(case.split)
    assert all(len(s) == 1 for s in sides.values())
    assert {c.split for c in cohort.cases} == {"train", "validation", "test"}


def test_uids_depend_on_their_parts_alone() -> None:
    assert dicom.uid(0, "a", 1) == dicom.uid(0, "a", 1)
    assert len({dicom.uid(0, "a", n) for n in range(100)}) == 100


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed")
@pytest.mark.parametrize("hospital", HOSPITALS, ids=lambda h: h.name)
def test_an_independent_checker_finds_no_errors(folder: Path, hospital: Hospital) -> None:
    seg, cls = (site_of(folder, kind, hospital) for kind in ("segmentation", "classification"))
    files = [slices_of(seg, rows_of(seg)[0])[0], cls.data.path / rows_of(cls)[0]["image"]]
    for file in files:
        said = subprocess.run(["dciodvfy", file], capture_output=True, text=True, check=False)
        assert "Error" not in said.stderr
