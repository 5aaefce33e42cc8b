"""Files that hold many cases as arrays: MedMNIST (.npz) and HDF5."""

from __future__ import annotations

import functools
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import CaseRef, Found, Picture, Quarantined
from medfl.common.errors import CaseError, DataError
from medfl.common.source import DataSource
from medfl.common.study import Study

_PARTS = (("train", "train"), ("val", "validation"), ("test", "test"))
# One .npz is decompressed as a whole; above this it would not fit in a hospital's workstation.
MAX_BYTES = 32 * 1024**3

Array = NDArray[np.generic]


def find_medmnist(source: DataSource, study: Study) -> Found:
    """The cases of one .npz or of every .npz in a folder, in the files' own order; of several, one
    that cannot be used is set aside.

    Where no file has a test part, the validation part counts as the test part.
    """
    files = sorted(source.path.glob("*.npz")) if source.path.is_dir() else [source.path]
    if not files:
        raise DataError("The folder has no .npz file. Check `path` in site.toml.")
    content, faulty = [], []
    for file in files:
        try:
            arrays = _load_npz(file)
            for part, _ in _PARTS:
                if f"{part}_images" in arrays:
                    _labels(arrays.get(f"{part}_labels"), len(arrays[f"{part}_images"]), study)
            content.append((file, arrays))
        except DataError as error:
            if len(files) == 1:
                raise
            faulty.append(Quarantined(file.name, "unreadable", str(error)))
    has_test = any("test_images" in arrays for _, arrays in content)
    cases: list[CaseRef] = []
    for file, arrays in content:
        start = 0
        for part, split in _PARTS:
            if f"{part}_images" not in arrays:
                continue
            count = len(arrays[f"{part}_images"])
            labels = _labels(arrays.get(f"{part}_labels"), count, study)
            name = "test" if split == "validation" and not has_test else split
            stem, files_of_case = file.stem, (file,)
            for i, label in enumerate(labels):
                case_id = f"{stem}/{part}/{i}"
                fields = {"split": name, "part": part, "file": stem} | label
                cases.append(
                    CaseRef(case_id, case_id, files_of_case, index=start + i, fields=fields)
                )
            start += count
    return Found(tuple(cases), tuple(faulty))


def _labels(labels: Array | None, count: int, study: Study) -> list[dict[str, str]]:
    """One dict of table fields a case: `label`, or a 0/1 field a class for multi-label studies."""
    if labels is None:
        return [{}] * count
    if len(labels) != count:
        raise DataError(f"The file has {count} images but {len(labels)} labels. Get it anew.")
    flat = labels.reshape(count, -1)
    classes = study.task.classes
    if study.task.multi_label:
        if flat.shape[1] != len(classes):
            raise DataError(
                f"The file has {flat.shape[1]} labels a case, the study {len(classes)} classes. "
                "Check that it is the study's data set."
            )
        return [{c: _text(v) for c, v in zip(classes, row, strict=True)} for row in flat]
    if flat.shape[1] != 1:
        raise DataError(
            f"The file has {flat.shape[1]} labels a case; the study expects one. "
            "Check that it is the study's data set."
        )
    return [{"label": _text(row[0])} for row in flat]


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def load_medmnist(ref: CaseRef, study: Study) -> Picture:
    """One image of an .npz as (C, *spatial). Raises CaseError."""
    arrays = _load_npz(ref.files[0])
    position = ref.index
    for part, _ in _PARTS:
        images = arrays.get(f"{part}_images")
        if images is not None:
            if position < len(images):
                return Picture(_channels_first(images[position], study))
            position -= len(images)
    raise CaseError("file_missing", f"the file has no image {ref.index}")


def no_mask(ref: CaseRef, study: Study) -> Picture:
    """MedMNIST has no masks. Raises CaseError."""
    raise CaseError("mask_missing", "MedMNIST files hold no masks")


def _channels_first(image: Array, study: Study) -> Array:
    """(*spatial) or (*spatial, C) -> (C, *spatial); the study's dimensions tell which it is."""
    dimensions = study.image.dimensions if study.image else 2
    if image.ndim == dimensions:
        return image[np.newaxis]
    if image.ndim == dimensions + 1:
        return np.moveaxis(image, -1, 0)
    raise CaseError("dimensions", f"the array has {image.ndim} dimensions")


def _load_npz(path: Path) -> dict[str, Array]:
    try:
        state = path.stat()
    except OSError:
        raise DataError(f"The file {path.name} is absent. Check `path` in site.toml.") from None
    return _npz(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _npz(path: Path, size: int, mtime_ns: int) -> dict[str, Array]:
    """All arrays of the file; size and mtime make a changed file a new entry."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise DataError(f"The file {path.name} expands to more than 32 GB. Split it.")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"The file {path.name} cannot be read as .npz ({error}). Get it anew."
        ) from None


def find_hdf5(source: DataSource, study: Study) -> Found:
    """Datasets images, labels, masks, patients, splits and cases, all with one entry a case."""
    file = _open_hdf5(source.path)
    names = {n: source.column(n) for n in ("images", "labels", "masks", "patients", "splits")}
    if names["images"] not in file:
        raise DataError(f"The file has no dataset {names['images']!r}. Check it, or `columns`.")
    images = _dataset(file, names["images"])
    count = len(images)

    def texts(name: str) -> list[str] | None:
        if names[name] not in file:
            return None
        values = _dataset(file, names[name])[()]
        if len(values) != count:
            raise DataError(f"The file has {count} images but {len(values)} {name}.")
        return [_text(v) for v in values]

    label_set = _dataset(file, names["labels"])[()] if names["labels"] in file else None
    labels = _labels(label_set, count, study)
    patients, splits = texts("patients"), texts("splits")
    masks = (source.path,) if names["masks"] in file else ()
    cases = []
    for i in range(count):
        fields = dict(labels[i]) | {n: names[n] for n in ("images", "masks")}
        if splits is not None:
            fields["split"] = splits[i]
        case_id = f"{source.path.stem}/{i}"
        patient = patients[i] if patients else case_id
        cases.append(CaseRef(case_id, patient, (source.path,), masks, i, fields))
    return Found(tuple(cases))


def load_hdf5(ref: CaseRef, study: Study) -> Picture:
    """One image of an HDF5 file as (C, *spatial). Raises CaseError."""
    return Picture(_channels_first(_entry(ref, "images"), study))


def load_hdf5_mask(ref: CaseRef, study: Study) -> Picture:
    """One mask of an HDF5 file as (*spatial). Raises CaseError."""
    if not ref.mask_files:
        raise CaseError("mask_missing")
    mask = _entry(ref, "masks")
    return Picture(mask[..., 0] if study.image and mask.ndim > study.image.dimensions else mask)


def _entry(ref: CaseRef, name: str) -> Array:
    dataset = _dataset(_open_hdf5(ref.files[0]), ref.fields[name])
    if math.prod(dataset.shape[1:]) * dataset.dtype.itemsize > MAX_BYTES // 4:
        raise CaseError("too_large", f"the dataset declares {dataset.shape}")
    try:
        return np.asarray(dataset[ref.index])
    except (OSError, ValueError) as error:
        raise CaseError("unreadable", str(error)) from None


def _dataset(file: Any, name: str) -> Any:
    """A dataset whose bytes lie in this very file. Raises DataError for links out of it."""
    import h5py

    dataset = None
    if isinstance(file.get(name, getlink=True), h5py.HardLink):
        dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise DataError(
            f"The dataset {name!r} points out of the file. Write its values into the file itself."
        )
    return dataset


def _open_hdf5(path: Path) -> Any:
    try:
        state = path.stat()
    except OSError:
        raise DataError(f"The file {path.name} is absent. Check `path` in site.toml.") from None
    return _hdf5(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _hdf5(path: Path, size: int, mtime_ns: int) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"The file {path.name} cannot be read as HDF5 ({error}).") from None
