"""The X-ray folder of one hospital: single DICOM images and who has an opacity."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation

from medfl.common.seeds import derive
from medfl.simulations.hospitals import anatomy, damage, dicom, tables
from medfl.simulations.hospitals.profiles import Hospital, Table, Xray

# A share of the images shows a patient who was there before.
RETURNING = 0.2


def write(hospital: Hospital, folder: Path, *, seed: int, small: bool) -> Table:
    """Write images/ and the table, which is returned; `Xray.damage` says what is wrong."""
    xray = hospital.xray
    images = xray.small_images if small else xray.images
    patients = _patients(images, derive(seed, hospital.name, "xray patients"))
    ids = tables.patient_numbers(hospital.number, images, derive(seed, hospital.name, "xray"))
    labels = draw_labels(hospital, seed, images)
    rows = [
        _write_image(hospital, folder, seed, n, patients[n], ids[patients[n]], bool(labels[n]))
        for n in range(images)
    ]
    for what, n in xray.damage:
        rows += DAMAGE[what](folder, rows[n])
    tables.write(xray.table, folder, rows)
    return xray.table


def draw_labels(hospital: Hospital, seed: int, images: int) -> NDArray[np.bool_]:
    """(images,) whether each shows an opacity; the share is the hospital's, to the image."""
    labels = np.arange(images) < round(images * hospital.xray.positive)
    rng = np.random.default_rng(derive(seed, hospital.name, "labels"))
    return np.asarray(rng.permutation(labels))


def expose(hospital: Hospital, seed: int, number: int, opacity: bool) -> NDArray[np.integer]:
    """Stored values (rows, columns) of one image, already inverted for MONOCHROME1."""
    xray = hospital.xray
    rng = np.random.default_rng(derive(seed, hospital.name, "chest", number))
    top = 2**xray.bits - 1
    stored = np.round(anatomy.chest(rng, xray.shape, opacity) * top)
    if xray.photometric == "MONOCHROME1":
        stored = top - stored
    kind = np.uint8 if xray.bits <= 8 else np.uint16
    return np.asarray(stored, dtype=kind)


def _patients(images: int, seed: int) -> list[int]:
    """Number of the patient of each image; some come more than once."""
    rng = np.random.default_rng(seed)
    patients = list(range(images))
    for n in range(1, images):
        if rng.random() < RETURNING:
            patients[n] = patients[int(rng.integers(n))]
    return patients


def _write_image(
    hospital: Hospital,
    folder: Path,
    seed: int,
    number: int,
    patient: int,
    patient_id: str,
    opacity: bool,
) -> tables.Row:
    xray = hospital.xray
    rng = np.random.default_rng(derive(seed, hospital.name, "xray person", patient))
    person = dicom.draw_person(rng, patient_id, hospital.families)
    date = f"2025{1 + number % 12:02d}{1 + number % 28:02d}"
    exam = dicom.Exam((seed, hospital.name, "xray", number), person, hospital.institution, date)
    ds = _describe(exam, xray)
    dicom.put_pixels(ds, expose(hospital, seed, number, opacity), xray.bits, xray.photometric)
    case_id = f"{2600100 + 7 * number}"
    file = f"{case_id}{xray.suffix}"
    dicom.save(ds, folder / "images" / file, xray.syntax)
    label = xray.labels[int(opacity)]
    return {"patient": patient_id, "case": case_id, "image": file, "label": label}


def _describe(exam: dicom.Exam, xray: Xray) -> Dataset:
    """Series and image modules of CR (PS3.3 C.8.1) or of DX for presentation (C.8.11)."""
    digital = xray.modality == "DX"
    kind = DigitalXRayImageStorageForPresentation if digital else ComputedRadiographyImageStorage
    ds = dicom.common(exam, kind, xray.modality, 1)
    ds.Modality = xray.modality
    ds.BodyPartExamined, ds.ViewPosition = "CHEST", "PA"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.BurnedInAnnotation = "NO"
    ds.PatientOrientation = ["L", "F"]
    ds.ImagerPixelSpacing = [f"{350 / side:.3f}" for side in xray.shape]
    ds.WindowCenter, ds.WindowWidth = str(2 ** (xray.bits - 1)), str(2**xray.bits)
    if digital:
        _describe_digital(ds)
    return ds


def _describe_digital(ds: Dataset) -> None:
    """What the DX information object asks for beyond CR (PS3.3 C.8.11.1 to C.8.11.4)."""
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.ImageLaterality = "U"
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "1", "0", "US"
    ds.PresentationLUTShape = "IDENTITY"
    ds.LossyImageCompression = "00"
    ds.DetectorType = "DIRECT"
    ds.AcquisitionContextSequence = []
    ds.AnatomicRegionSequence = [_code("43799004", "SCT", "Chest")]
    ds.ViewCodeSequence = [_code("399348003", "SCT", "Antero-posterior projection")]
    ds.ViewPosition = "AP"


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _truncated(folder: Path, row: tables.Row) -> list[tables.Row]:
    damage.truncate(folder / "images" / row["image"])
    return []


def _text_instead(folder: Path, row: tables.Row) -> list[tables.Row]:
    damage.write_text(folder / "images" / row["image"])
    return []


def _empty_file(folder: Path, row: tables.Row) -> list[tables.Row]:
    (folder / "images" / row["image"]).write_bytes(b"")
    return []


def _label_missing(folder: Path, row: tables.Row) -> list[tables.Row]:
    row["label"] = ""
    return []


def _duplicate_image(folder: Path, row: tables.Row) -> list[tables.Row]:
    copy = f"copy-of-{row['image']}"
    shutil.copyfile(folder / "images" / row["image"], folder / "images" / copy)
    return [{**row, "case": f"{row['case']}-2", "image": copy}]


DAMAGE: dict[str, Callable[[Path, tables.Row], list[tables.Row]]] = {
    "truncated": _truncated,
    "text_instead": _text_instead,
    "empty_file": _empty_file,
    "label_missing": _label_missing,
    "duplicate_image": _duplicate_image,
}
