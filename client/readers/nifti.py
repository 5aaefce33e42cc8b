"""NIfTI volumes in a folder, a table, or the Medical Segmentation Decathlon's layout."""

from __future__ import annotations

import importlib
import io
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
from medfl.client.data.space import onto
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
# The header's own unit of length; without one it is taken for millimetres, as all programs do.
_MM = {"meter": 1000.0, "mm": 1.0, "micron": 1e-3}
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def find(source: DataSource, study: Study) -> Found:
    """Cases of a table, or every volume of a folder; a first-level sub-folder is a patient."""
    if source.table is not None:
        found = find_in_table(source, study, SUFFIXES)
    else:
        found = find_in_folder(source, SUFFIXES, folder_is="patient")
    return _with_sizes(found)


def find_decathlon(source: DataSource, study: Study) -> Found:
    """imagesTr and labelsTr, with or without dataset.json; every image is its own patient.

    Files named CASE_0000, CASE_0001 are the channels of one case (nnU-Net's layout), unless
    labelsTr has a file of that whole name: then the digits number the cases.
    """
    root = source.path
    listed = _listed(root)
    groups: dict[str, list[Path]] = {}
    for file in listed if listed is not None else files_below(root / "imagesTr", SUFFIXES):
        name = stem(file, SUFFIXES)
        whole = any((root / "labelsTr" / f"{name}{suffix}").is_file() for suffix in SUFFIXES)
        match = None if whole else _CHANNEL.match(name)
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
            size = tuple(int(n) for n in header.shape[:3])
            cases.append(replace(ref, size=size, two_places=_two_places(header)))
        except CaseError as error:
            faulty.append(Quarantined(ref.case_id, error.reason, error.detail))
    return Found(tuple(cases), tuple(faulty))


def load(ref: CaseRef, study: Study) -> Picture:
    """One case; several files are its channels. Raises CaseError."""
    parts = [read(file, ref.orientation) for file in ref.files]
    first = parts[0]
    dimensions = first.array.ndim - 1
    if any(p.array.ndim - 1 != dimensions for p in parts):
        raise CaseError("mixed_geometry", "the channels' files differ in size")
    others = [onto(p, first, dimensions, "mixed_geometry") for p in parts[1:]]
    return replace(first, array=np.concatenate([p.array for p in (first, *others)]))


def load_mask(ref: CaseRef, study: Study) -> Picture:
    """The mask of one case, (*spatial). Raises CaseError."""
    if not ref.mask_files:
        raise CaseError("mask_missing")
    file = ref.mask_files[0]
    if not file.name.lower().endswith(SUFFIXES):
        # Rows of a NIfTI slice may run up or down; those of a picture do not say which.
        raise CaseError("mask_geometry", "a picture does not say where it lies on a NIfTI slice")
    picture = read(file, ref.orientation)
    if picture.array.shape[0] != 1:
        raise CaseError("mask_geometry", "the mask holds more than one volume")
    return replace(picture, array=picture.array[0])


def read(path: Path, declared: str = "") -> Picture:
    """A NIfTI file as (C, X, Y, Z), or (C, H, W) for a single slice.

    declared: orientation of the stored voxels where the header gives none (RAS and the like).

    Raises:
        CaseError: "unreadable", "too_large", "bad_affine", "no_affine" or "dimensions".
    """
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
    affine = _affine(volume, declared)
    if not np.isfinite(affine).all() or (np.linalg.norm(affine[:3, :3], axis=0) < 1e-9).any():
        raise CaseError("bad_affine", path.name)
    spacing = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
    if abs(np.linalg.det(affine[:3, :3] / np.array(spacing))) < 1e-3:
        raise CaseError("bad_affine", path.name)
    array = _channels_first(array)
    if array.shape[-1] == 1 or array.ndim == 3:
        # X runs along columns, so that a slice as rows and columns is its transpose.
        flat = array.reshape(array.shape[:3]).transpose(0, 2, 1)
        return Picture(flat, affine[:, [1, 0, 2, 3]], (spacing[1], spacing[0]))
    return Picture(array, affine, spacing)


def _affine(volume: Any, declared: str) -> NDArray[np.float64]:
    """Voxel index -> RAS mm: sform, else qform, else what the site declares; in its own units.

    Without both codes the standard knows no place, and programs disagree about left and right.
    """
    orientations: Any = importlib.import_module("nibabel.orientations")
    header = volume.header
    try:
        unit = _MM.get(header.get_xyzt_units()[0], 1.0)
    except KeyError:
        unit = 1.0
    if int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0:
        affine = np.array(volume.affine, dtype=np.float64)
    elif declared:
        affine = np.eye(4)
        zooms = (*(float(z) for z in header.get_zooms()[:3]), 1.0)
        affine[:3, :3] = 0
        for axis, (to, sign) in enumerate(orientations.axcodes2ornt(tuple(declared))):
            affine[int(to), axis] = sign * zooms[axis]
    else:
        raise CaseError("no_affine", "qform_code and sform_code are 0")
    affine[:3] *= unit
    return affine


def _two_places(volume: Any) -> bool:
    """Whether qform and sform both say a place, and corners of the volume are a voxel apart."""
    header = volume.header
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    if sform is None or qform is None:
        return False
    ends = np.array(np.meshgrid(*((0, n - 1) for n in (*volume.shape, 1, 1)[:3]))).reshape(3, -1)
    apart = (sform - qform)[:3, :3] @ ends + (sform - qform)[:3, 3:]
    voxel = np.linalg.norm(sform[:3, :3], axis=0).max()
    return bool(np.linalg.norm(apart, axis=0).max() > max(float(voxel), 1e-6))


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
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        if path.name.lower().endswith(".gz") and not gzipped:
            return _uncompressed(path)
        return nibabel.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise CaseError("unreadable", f"{path.name}: {error}") from None


def _uncompressed(path: Path) -> Any:
    """A plain file whose name says that it is compressed."""
    import nibabel
    from nibabel.fileholders import FileHolder

    if path.stat().st_size > MAX_BYTES:
        raise CaseError("too_large", path.name)
    content = path.read_bytes()
    length = int.from_bytes(content[:4], "little")
    # The header begins with its own length, in either order of bytes.
    kinds: Any = {348: nibabel.Nifti1Image, 540: nibabel.Nifti2Image}
    kind = kinds.get(length) or kinds.get(int.from_bytes(content[:4], "big"))
    if kind is None or len(content) < 348:
        raise CaseError("unreadable", f"{path.name}: neither gzip nor NIfTI")
    return kind.from_file_map({"image": FileHolder(fileobj=io.BytesIO(content))})
