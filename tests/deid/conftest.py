"""What the tests of de-identification share: a planted patient, and what may not come out again."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pydicom.valuerep import PersonName

from medfl.client.deid import table
from medfl.client.readers import sandbox

_ENCODINGS = ("latin-1", "utf-8", "utf-16-le", "utf-16-be")


def _walked(dataset: Any) -> Iterator[Any]:
    """Every element, in all sequences, private ones included, except what cannot be read."""
    for tag in sorted(dataset.keys()):
        try:
            element = dataset[tag]
            items = element.value if element.VR == "SQ" else ()
        except (ValueError, TypeError, NotImplementedError, AttributeError):
            continue
        yield element
        for item in items or ():
            yield from _walked(item)


def _texts(element: Any) -> list[str]:
    value = element.value
    if element.VR == "SQ" or value is None:
        return []
    if isinstance(value, bytes):
        # Long private blocks hold texts between numbers: every readable run counts.
        return [m.decode("ascii") for m in re.findall(rb"[A-Za-z][ -~]{5,60}", value)]
    if isinstance(value, PersonName):
        return [str(value)]
    many = value if not isinstance(value, str) and hasattr(value, "__iter__") else [value]
    return [
        str(v).strip(" \0") for v in many if isinstance(v, str) or not isinstance(v, int | float)
    ]


def _telling(dataset: Any) -> set[str]:
    """Names, numbers, dates, UIDs, free texts and private values: nothing of it may come out."""
    keep = table.kept()
    telling: set[str] = set()
    harmless = {"REMOVED", "19000101", "000000", "DCM"}
    for element in _walked(dataset):
        keyword = "" if element.tag.is_private else element.keyword
        if keyword in keep and element.VR != "UI":
            harmless |= set(_texts(element))
        elif keyword not in ("TransferSyntaxUID", "DeidentificationMethod"):
            telling |= {t for t in _texts(element) if t not in UID_dictionary}
    for name in [t for t in telling if "^" in t]:
        telling |= set(name.split("^"))
    # Numbers of a few digits are part of others by chance.
    long = {t for t in telling if len(t) >= (6 if t.isdigit() else 4)}
    return {t for t in long if not any(t in h for h in harmless)}


def _leaked(telling: set[str], content: bytes) -> set[str]:
    """Those of `telling` that occur outside the picture, in any of the usual encodings."""
    start = content.find(b"\xe0\x7f\x10\x00")
    # Any four bytes are in some picture; what lies behind it counts again.
    where = content if start < 0 else content[: start + 64] + content[-512:]
    return {
        text
        for text in telling
        if any(code in where for code in {text.encode(e, "ignore") for e in _ENCODINGS} if code)
    }


@pytest.fixture(scope="session")
def secret() -> bytes:
    return bytes(range(32))


@pytest.fixture(scope="session")
def telling_of() -> Callable[..., set[str]]:
    """telling_of(dataset, path): all that must not come out, the file's own name included."""

    def find(dataset: Any, path: Path | None = None) -> set[str]:
        names = {path.name, path.stem} if path is not None else set()
        meta = _telling(dataset.file_meta) if "file_meta" in vars(dataset) else set()
        return _telling(dataset) | meta | {n for n in names if len(n) >= 4}

    return find


@pytest.fixture(scope="session")
def leaks() -> Callable[[set[str], bytes], set[str]]:
    """leaks(telling, content): those that occur in a file's bytes, in any usual encoding."""
    return _leaked


@pytest.fixture(scope="session")
def deidentify(secret: bytes) -> Callable[..., Dataset]:
    """deidentify(path, retain_device=True, ...): one file through the limited child."""

    def one(path: Path, **options: Any) -> Dataset:
        request = {"command": "deidentify", "options": options, "secret": secret.hex()}
        answer = sandbox.ask(request | {"file": str(path), "look": False}, 60.0)
        assert answer.array is not None
        content = answer.array.tobytes()
        return dcmread(io.BytesIO(content))

    return one


@pytest.fixture
def planted() -> Callable[..., Dataset]:
    """A CT slice with something that identifies in every place where such things hide."""

    def make(instance: str = "1.2.826.1.4711.3", **elements: Any) -> Dataset:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.SourceApplicationEntityTitle = "WARD7AET"
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = instance
        ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.826.1.4711.1", "1.2.826.1.4711.2"
        ds.FrameOfReferenceUID = "1.2.826.1.4711.9"
        ds.PatientName, ds.PatientID = "Quillfeather^Ottoline", "HOSP-778812"
        ds.PatientBirthDate, ds.PatientAge, ds.PatientSex = "19230514", "095Y", "F"
        ds.PatientWeight, ds.EthnicGroup = "61.25", "Valdorian"
        ds.StudyDate, ds.StudyTime = "20190228", "233015.5"
        ds.SeriesDate, ds.SeriesTime = "20190301", "000200"
        ds.AcquisitionDateTime = "20190301000130.250000+0100"
        ds.AccessionNumber, ds.StudyID = "ACC990017", "STU4455"
        ds.InstitutionName, ds.StationName = "Saint Brannock Infirmary", "CTROOM9"
        ds.DeviceSerialNumber = "SN-8812-77"
        ds.StudyDescription = "CT Thorax axial fuer Frau Quillfeather, Zimmer 12"
        ds.ImageComments = "seen by Dr Mandelbrook"
        ds.ReferringPhysicianName = "Mandelbrook^Ignatius"
        ds.Modality, ds.BodyPartExamined = "CT", "CHEST"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "QUILLFEATHER"]
        ds.ConvolutionKernel = "B30 Quillfeather"
        other = Dataset()
        other.PatientID, other.TypeOfPatientID = "OLD-554433", "TEXT"
        ds.OtherPatientIDsSequence = Sequence([other])
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator = "X1", "99BRANNOCK"
        code.CodeMeaning = "Ottoline special protocol"
        public = Dataset()
        public.CodeValue, public.CodingSchemeDesignator = "51185008", "SCT"
        public.CodeMeaning = "Chest"
        ds.AnatomicRegionSequence = Sequence([code, public])
        source = Dataset()
        source.ReferencedSOPClassUID = CTImageStorage
        source.ReferencedSOPInstanceUID = "1.2.826.1.4711.77"
        source.OperatorsName = "Pettigrew^Sybil"
        block = source.private_block(0x0011, "BRANNOCK PRIVATE", create=True)
        block.add_new(0x01, "LO", "nested Quillfeather")
        ds.SourceImageSequence = Sequence([source])
        siemens = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        siemens.add_new(0x0C, "IS", "1000")
        siemens.add_new(0x09, "LO", "Ottoline was here")
        ds.add_new(0x60000010, "US", 3)
        ds.add_new(0x60000011, "US", 4)
        ds.add_new(0x60003000, "OW", b"QUILLFEATHER")
        ds.add_new(0x50000040, "LO", "curve Quillfeather")
        ds.Rows, ds.Columns, ds.SamplesPerPixel = 3, 4, 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelSpacing = [2.0, 0.5]
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [1, 2, 3], [1, 0, 0, 0, 1, 0]
        for name, value in elements.items():
            setattr(ds, name, value)
        ds.PixelData = elements.get("PixelData", np.arange(12, dtype="<u2").tobytes())
        ds.preamble = b"preamble of Quillfeather".ljust(128, b"\0")
        return ds

    return make


@pytest.fixture
def write() -> Callable[[Dataset, Path], Path]:
    def save(dataset: Dataset, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
        return path

    return save
