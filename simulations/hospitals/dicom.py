"""DICOM files as a hospital's archive holds them, with patients who never lived."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

# Name space of the version-5 UUIDs below; any fixed one does.
_SPACE = uuid.UUID("6f1f3d0c-9a53-5b0e-8f7a-2d6b7c1e4a10")

# The encoder is named, because another one may write other bytes.
_ENCODERS = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}


@dataclass(frozen=True, slots=True)
class Person:
    """What a hospital writes about a patient. number: as PatientID, leading zeros included."""

    number: str
    name: str
    birth_date: str
    sex: str


@dataclass(frozen=True, slots=True)
class Exam:
    """One examination. key: what its UIDs are made from. date: YYYYMMDD."""

    key: tuple[str | int, ...]
    person: Person
    institution: str
    date: str


def uid(*parts: str | int) -> UID:
    """A UID below 2.25 (PS3.5 section B.2) that depends on `parts` alone."""
    return UID(f"2.25.{uuid.uuid5(_SPACE, '/'.join(map(str, parts))).int}")


def draw_person(rng: np.random.Generator, number: str, families: Sequence[str]) -> Person:
    """A patient with a family name out of `families`."""
    sex = str(rng.choice(["F", "M"]))
    given = {"F": ["Anna", "Maria", "Claire", "Ruth"], "M": ["Paul", "Jan", "Louis", "Thomas"]}
    year, month, day = rng.integers(1935, 2004), rng.integers(1, 13), rng.integers(1, 29)
    name = f"{rng.choice(list(families))}^{rng.choice(given[sex])}"
    return Person(number, name, f"{year}{month:02d}{day:02d}", sex)


def common(exam: Exam, sop_class: UID, series: str | int, instance: int) -> Dataset:
    """Patient, study, series, equipment and SOP modules that every image has (PS3.3 annex A)."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = uid(*exam.key, series, instance)
    ds.StudyDate = ds.ContentDate = ds.AcquisitionDate = exam.date
    ds.StudyTime = ds.ContentTime = ds.AcquisitionTime = "101500"
    ds.AccessionNumber = f"A{int(uid(*exam.key)[5:]) % 10**8:08d}"
    ds.Manufacturer, ds.ManufacturerModelName = "medfl synthetic", "not a scanner"
    ds.InstitutionName = exam.institution
    ds.ReferringPhysicianName = "Arzt^Eva"
    ds.StationName = "ROOM2"
    ds.PatientName, ds.PatientID = exam.person.name, exam.person.number
    ds.PatientBirthDate, ds.PatientSex = exam.person.birth_date, exam.person.sex
    ds.StudyInstanceUID = uid(*exam.key)
    ds.SeriesInstanceUID = uid(*exam.key, series)
    ds.StudyID, ds.SeriesNumber = "1", 2
    ds.InstanceNumber = instance
    return ds


def put_pixels(ds: Dataset, stored: NDArray[np.integer], bits: int, photometric: str) -> None:
    """Image Pixel module (PS3.3 C.7.6.3). stored: (rows, columns), 8 or 16 bits an entry."""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = photometric
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated = 8 * stored.dtype.itemsize
    ds.BitsStored, ds.HighBit = bits, bits - 1
    ds.PixelRepresentation = int(np.issubdtype(stored.dtype, np.signedinteger))
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 else "OW"


def save(ds: Dataset, path: Path, syntax: UID) -> None:
    """Write a Part 10 file, compressed without loss where `syntax` asks for it."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_compressed else syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    if syntax.is_compressed:
        ds.compress(syntax, encoding_plugin=_ENCODERS[syntax], generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
