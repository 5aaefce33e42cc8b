"""NIfTI volumes in a folder, a table, or the Medical Segmentation Decathlon's layout."""

from __future__ import annotations

import json
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import CaseRef, Found, Picture, Quarantined
from medfl.client.readers import image as images
from medfl.client.readers.rows import (
    confined,
    files_below,
    find_in_folder,
    find_in_table,
    stem,
)
from medfl.common.errors import CaseError, DataError
from medfl.common.source import DataSource
from medfl.common.study import Study

SUFFIXES = (".nii.gz", ".nii")
# A volume above this is a damaged header or an attack on memory: the largest clinical CT is 2 GB.
MAX_BYTES = 8 * 1024**3
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def find(source: DataSource, study: Study) -> Found:
    """Cases of a table, or every volume of a folder; a first-level sub-folder is a patient."""
    if source.table is not None:
        found = find_in_table(source, SUFFIXES)
    else:
        found = find_in_folder(source, SUFFIXES, folder_is="patient")
    return _with_sizes(found)


def find_decathlon(source: DataSource, study: Study) -> Found:
    """imagesTr and labelsTr, with or without dataset.json; every image is its own patient.

    Files named CASE_0000, CASE_0001 are the channels of one case (nnU-Net's layout).
    """
    root = source.path
    listed = _listed(root)
    groups: dict[str, list[Path]] = {}
    for file in listed if listed is not None else files_below(root / "imagesTr", SUFFIXES):
        name = stem(file, SUFFIXES)
        match = _CHANNEL.match(name)
        groups.setdefault(match["case"] if match else name, []).append(file)
    if not groups:
        raise DataError("The folder has no volumes in imagesTr. Check `path` in site.toml.")
    cases: list[CaseRef] = []
    faulty: list[Quarantined] = []
    for case, files in sorted(groups.items()):
        masks = [root / "labelsTr" / f"{case}{suffix}" for suffix in SUFFIXES]
        try:
            there = tuple(confined(root, m) for m in masks if m.is_file())[:1]
            cases.append(
                CaseRef(case, case, tuple(confined(root, f) for f in sorted(files)), there)
            )
        except CaseError as error:
            faulty.append(Quarantined(case, error.reason, error.detail))
    return _with_sizes(Found(tuple(cases), tuple(faulty)))


def _listed(root: Path) -> list[Path] | None:
    """The training images that dataset.json names; None without that list."""
    path = root / "dataset.json"
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return [root / entry["image"] for entry in plain["training"]] or None
    except (KeyError, TypeError):
        return None
    except ValueError:
        raise DataError(
            "dataset.json is not valid JSON. Correct it, or remove it: the folders say it all."
        ) from None


def _with_sizes(found: Found) -> Found:
    """The same cases with the sizes of their headers; unreadable ones are set apart."""
    cases: list[CaseRef] = []
    faulty = list(found.quarantined)
    for ref in found.cases:
        try:
            header: Any = _open(ref.files[0])
            cases.append(replace(ref, size=tuple(int(n) for n in header.shape[:3])))
        except CaseError as error:
            faulty.append(Quarantined(ref.case_id, error.reason, error.detail))
    return Found(tuple(cases), tuple(faulty))


def load(ref: CaseRef, study: Study) -> Picture:
    """One case; several files are its channels. Raises CaseError."""
    parts = [read(file) for file in ref.files]
    first = parts[0]
    if any(p.array.shape[1:] != first.array.shape[1:] for p in parts):
        raise CaseError("mixed_geometry", "the channels' files differ in size")
    return replace(first, array=np.concatenate([p.array for p in parts]))


def load_mask(ref: CaseRef, study: Study) -> Picture:
    """The mask of one case, (*spatial). Raises CaseError."""
    if not ref.mask_files:
        raise CaseError("mask_missing")
    file = ref.mask_files[0]
    if not file.name.lower().endswith(SUFFIXES):
        return images.read_mask(file, study.task)
    picture = read(file)
    if picture.array.shape[0] != 1:
        raise CaseError("mask_geometry", "the mask holds more than one volume")
    return replace(picture, array=picture.array[0])


def read(path: Path) -> Picture:
    """A NIfTI file as (C, X, Y, Z), or (C, H, W) for a single slice. Raises CaseError."""
    volume: Any = _open(path)
    shape = tuple(int(n) for n in volume.shape)
    if math.prod(shape) * np.dtype(np.float64).itemsize > MAX_BYTES:
        raise CaseError("too_large", f"the header declares {shape}")
    try:
        array: NDArray[np.generic] = np.asanyarray(volume.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CaseError("unreadable", f"{path.name}: {error}") from None
    if array.dtype.fields is not None or array.dtype.kind not in "iufb":
        raise CaseError("unreadable", f"values of type {array.dtype}")
    affine = np.asarray(volume.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise CaseError("bad_affine", path.name)
    spacing = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
    array = _channels_first(array)
    if array.shape[-1] == 1 or array.ndim == 3:
        # X runs along columns, so that a slice as rows and columns is its transpose.
        flat = array.reshape(array.shape[:3]).transpose(0, 2, 1)
        return Picture(flat, None, (spacing[1], spacing[0]))
    return Picture(array, affine, spacing)


def _channels_first(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """(X, Y), (X, Y, Z), (X, Y, Z, C) or NIfTI's vector (X, Y, Z, 1, C) -> (C, X, Y[, Z])."""
    if array.ndim == 5 and array.shape[3] == 1:
        array = array[:, :, :, 0]
    if array.ndim in (2, 3):
        return array[np.newaxis]
    if array.ndim == 4:
        return np.moveaxis(array, -1, 0)
    raise CaseError("dimensions", f"the file has {array.ndim} dimensions")


def _open(path: Path) -> Any:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        return nibabel.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise CaseError("unreadable", f"{path.name}: {error}") from None
