"""Studies and small DICOM series for the tests of a hospital's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medfl.common.study import Federation, ImageInput, Model, Study, Task, Training


@pytest.fixture(scope="session")
def study() -> Callable[..., Study]:
    """A study with two classes, changed by keyword; `kind`, `classes` and `image` for short."""

    def make(
        kind: str = "classification",
        classes: Sequence[str] = ("no", "yes"),
        label_map: dict[str, str] | None = None,
        multi_label: bool = False,
        **changes: Any,
    ) -> Study:
        task = Task(
            kind=kind,  # type: ignore[arg-type]
            classes=list(classes),
            label_map=label_map,
            multi_label=multi_label,
        )
        base = Study(
            name="test",
            task=task,
            model=Model(name="any"),
            training=Training(local_steps=1),
            federation=Federation(rounds=1),
        )
        return replace(base, **changes)

    return make


@pytest.fixture(scope="session")
def volumes(study: Callable[..., Study]) -> Study:
    return study("segmentation", image=ImageInput(dimensions=3, size=[8, 8, 8], intensity="none"))


@pytest.fixture(scope="session")
def planes(study: Callable[..., Study]) -> Study:
    return study("segmentation", image=ImageInput(dimensions=2, size=[8, 8], intensity="none"))


@pytest.fixture(scope="session")
def dicom_slice() -> Callable[..., Dataset]:
    """One CT slice with 3 rows and 4 columns; rows 2 mm apart, columns 0.5 mm, 16 bits."""

    def make(
        pixels: NDArray[Any] | None = None,
        position: Sequence[float] = (10.0, 20.0, 30.0),
        series: str = "1.2.3",
        syntax: str = ExplicitVRLittleEndian,
        **elements: Any,
    ) -> Dataset:
        pixels = np.arange(12, dtype=np.int16).reshape(3, 4) if pixels is None else pixels
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "p1", "1.2", series
        ds.Modality = "CT"
        ds.Rows, ds.Columns = pixels.shape[:2]
        ds.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
        ds.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
        if pixels.ndim == 3:
            ds.PlanarConfiguration = 0
        ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
        ds.HighBit = ds.BitsStored - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        ds.PixelSpacing = [2.0, 0.5]
        ds.ImagePositionPatient = list(position)
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        for name, value in elements.items():
            setattr(ds, name, value)
        ds.PixelData = pixels.tobytes()
        return ds

    return make


@pytest.fixture(scope="session")
def save() -> Callable[[Dataset, Path], Path]:
    def write(ds: Dataset, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
        return path

    return write
