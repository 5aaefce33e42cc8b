"""Made-up CT series as compressed DICOM files, and how long decoding them takes by itself."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.source import DataSource


def source(folder: Path) -> DataSource:
    """What `write` has written, as a hospital's data."""
    return DataSource(format="dicom", path=folder / "series", table=folder / "cases.csv")


def write(folder: Path, series: int, slices: int, side: int) -> None:
    """Series of one patient each, 16 bits, lossless JPEG 2000, and a table of labels."""
    rows = ["patient,label", *(f"p{n:04},{'yes' if n % 2 else 'no'}" for n in range(series))]
    folder.mkdir(parents=True)
    (folder / "cases.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    with _pool() as pool:
        list(pool.map(partial(_write_series, folder / "series", slices, side), range(series)))


def decoding_s(folder: Path) -> float:
    """Seconds that it takes all cores to read the files and decode their pixels, nothing else."""
    files = sorted((folder / "series").rglob("*.dcm"))
    with _pool() as pool:
        list(pool.map(_decode, files[:8]))  # imports and decoders are loaded
        started = time.perf_counter()
        list(pool.map(_decode, files, chunksize=8))
        return time.perf_counter() - started


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))


def _write_series(folder: Path, slices: int, side: int, number: int) -> None:
    from pydicom.uid import JPEG2000Lossless

    own = folder / f"p{number:04}"
    own.mkdir(parents=True)
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:side, :side] / side - 0.5
    for k in range(slices):
        disc = np.hypot(x, y) < 0.2 + 0.2 * k / slices
        pixels = (1000 * disc + rng.normal(0, 12, disc.shape)).astype(np.int16)
        dataset = _slice(number, k, pixels)
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
        dataset.save_as(own / f"{k:04}.dcm", enforce_file_format=True)


def _slice(series: int, k: int, pixels: NDArray[np.int16]) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = CTImageStorage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{series}.{k}")
    made.PatientID = f"p{series:04}"
    made.StudyInstanceUID, made.SeriesInstanceUID = f"1.2.4.{series}", f"1.2.3.{series}"
    made.Modality = "CT"
    made.Rows, made.Columns = pixels.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 1
    made.PixelSpacing = [1.0, 1.0]
    made.ImagePositionPatient = [0.0, 0.0, 2.0 * k]
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    made.PixelData = pixels.tobytes()
    return made


def _decode(file: Path) -> int:
    from pydicom import dcmread

    return int(dcmread(file).pixel_array.sum())
