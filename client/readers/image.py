"""PNG, JPEG, GIF and TIFF images in a folder or named by a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import CaseRef, Found, Picture
from medfl.client.data.mask_values import classes_of, classes_of_colours
from medfl.client.readers.rows import find_in_folder, find_in_table
from medfl.client.readers.tiff import MAX_PIXELS, check_alpha, read_tiff
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import Study, Task

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG_START = b"\xff\xd8"


def find(source: DataSource, study: Study) -> Found:
    """Cases of a table, or every image of a folder; a first-level sub-folder is then the label."""
    if source.table is not None:
        return find_in_table(source, study, SUFFIXES)
    return find_in_folder(source, SUFFIXES, folder_is="label")


def load(ref: CaseRef, study: Study) -> Picture:
    """One image as (C, H, W). Raises CaseError."""
    channels = study.image.channels if study.image else None
    return Picture(np.moveaxis(_hwc(read(ref.files[0], channels)), -1, 0))


def load_mask(ref: CaseRef, study: Study) -> Picture:
    """One mask as (H, W) of class numbers, by `label_map` or its rules. Raises CaseError."""
    if not ref.mask_files:
        raise CaseError("mask_missing")
    return read_mask(ref.mask_files[0], study.task)


def read_mask(path: Path, task: Task) -> Picture:
    """A mask file as (H, W) of class numbers; greys are values, colours count as colours.

    With two classes an instance map (0 background, 1..n objects) is foreground above 0, but not
    from a JPEG, whose values near black and white are traces of compression. Raises CaseError.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise CaseError("unreadable", f"{path.name} is no mask format that medfl reads")
    start = _start(path)
    indices = None
    if start in _TIFF_STARTS:
        array = _hwc(read_tiff(path, None))
    else:
        shown, indices = _read_pillow(path)
        array = _hwc(shown)
    if array.shape[-1] == 1 or (array == array[..., :1]).all():
        objects = not start.startswith(_JPEG_START)
        return Picture(classes_of(array[..., 0], task, objects=objects), classed=True)
    if array.shape[-1] != 3 or array.max() > 255:
        raise CaseError("mask_values", f"{array.shape[-1]} channels of up to {array.max()}")
    return Picture(classes_of_colours(array, task, indices), classed=True)


def read(path: Path, channels: int | None = None) -> NDArray[np.generic]:
    """Pixels as (H, W) or (H, W, C) as a viewer shows them, without alpha. Raises CaseError."""
    if _start(path) in _TIFF_STARTS:
        return read_tiff(path, channels)
    return _read_pillow(path)[0]


def _start(path: Path) -> bytes:
    """What the file is, whatever its name says."""
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise CaseError("unreadable", f"{path.name}: {error.strerror}") from None


def _read_pillow(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """(pixels as seen, indices of a palette whose first colour is black or None)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=("PNG", "JPEG", "GIF")) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise CaseError("too_large", f"{opened.width} × {opened.height} pixels")
            pictures = getattr(opened, "n_frames", 1) if opened.format == "GIF" else 1
            if pictures > 1:
                raise CaseError("dimensions", f"the GIF holds {pictures} pictures")
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            return _seen(upright), _indices(upright)
    except Image.DecompressionBombError:
        raise CaseError("too_large", path.name) from None
    except (MemoryError, CaseError):
        raise
    except Exception as error:  # noqa: BLE001  decoders raise what they like; it costs this file
        raise CaseError("unreadable", f"{path.name}: {error}") from None


def _seen(picture: Any) -> NDArray[np.generic]:
    """Colours of palettes looked up, 1 bit as 0 and 255, alpha checked and left."""
    key = picture.info.get("transparency")
    if picture.mode in ("P", "PA"):
        check_alpha(np.asarray(picture.convert("RGBA"))[..., 3])
        return np.asarray(picture.convert("RGB"))
    if picture.mode in ("LA", "La", "RGBA", "RGBa"):
        array = np.asarray(picture)
        check_alpha(array[..., -1])
        return array[..., 0] if array.shape[-1] == 2 else array[..., :3]
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        picture = picture.convert("RGB")
    elif picture.mode == "1":
        picture = picture.convert("L")
    array = np.asarray(picture)
    if key is not None and not isinstance(key, bytes):
        check_alpha(np.asarray(np.atleast_3d(array == np.asarray(key)).all(axis=-1)))
    return array


def _indices(picture: Any) -> NDArray[np.generic] | None:
    if picture.mode != "P" or tuple((picture.getpalette("RGB") or [1])[:3]) != (0, 0, 0):
        return None
    return np.asarray(picture)


def _hwc(array: NDArray[np.generic]) -> NDArray[np.generic]:
    if array.ndim == 2:
        return array[..., np.newaxis]
    if array.ndim != 3:
        raise CaseError("dimensions", f"the file has {array.ndim} dimensions")
    return array
