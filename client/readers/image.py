"""PNG, JPEG and TIFF images in a folder or named by a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import CaseRef, Found, Picture
from medfl.client.readers.rows import find_in_folder, find_in_table
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import Study

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Above this a picture is a decompression bomb or a slide, which these readers do not serve.
MAX_PIXELS = 400_000_000


def find(source: DataSource, study: Study) -> Found:
    """Cases of a table, or every image of a folder; a first-level sub-folder is then the label."""
    if source.table is not None:
        return find_in_table(source, SUFFIXES)
    return find_in_folder(source, SUFFIXES, folder_is="label")


def load(ref: CaseRef, study: Study) -> Picture:
    """One image as (C, H, W). Raises CaseError."""
    return Picture(np.moveaxis(_hwc(read(ref.files[0])), -1, 0))


def load_mask(ref: CaseRef, study: Study) -> Picture:
    """One mask as (H, W); an instance map (0 background, 1..n objects) becomes 0/1.

    With two classes every value above 0 is the foreground, so that 0/255 masks serve too.
    """
    if not ref.mask_files:
        raise CaseError("mask_missing")
    mask = read_mask(ref.mask_files[0])
    if len(study.task.classes) == 2:
        return Picture((mask.array > 0).astype(np.uint8))  # type: ignore[operator]
    return mask


def read_mask(path: Path) -> Picture:
    """A mask file's values as (H, W). Raises CaseError."""
    if not path.name.lower().endswith(SUFFIXES):
        raise CaseError("unreadable", f"{path.name} is no mask format that medfl reads")
    array = _hwc(read(path, colours=False))
    if array.shape[-1] > 1 and (array != array[..., :1]).any():
        raise CaseError("mask_values", "the mask is a colour image")
    return Picture(array[..., 0])


def read(path: Path, *, colours: bool = True) -> NDArray[np.generic]:
    """Pixels as (H, W) or (H, W, C), without an alpha channel. Raises CaseError.

    colours: look a palette's colours up; masks want the palette's indices.
    """
    if path.name.lower().endswith((".tif", ".tiff")):
        return _read_tiff(path)
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=("PNG", "JPEG")) as opened:
            _check_size(opened.width * opened.height)
            picture: Image.Image = opened
            if opened.mode == "P":
                picture = opened.convert("RGB") if colours else opened
            elif opened.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                picture = opened.convert("RGB")
            elif opened.mode == "1":
                picture = opened.convert("L")
            return _without_alpha(np.asarray(ImageOps.exif_transpose(picture)))
    except Image.DecompressionBombError:
        raise CaseError("too_large", path.name) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise CaseError("unreadable", f"{path.name}: {error}") from None


def _read_tiff(path: Path) -> NDArray[np.generic]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            _check_size(int(np.prod(page.shape)))
            if len(file.pages) > 1:
                raise CaseError("dimensions", f"the TIFF holds {len(file.pages)} pages")
            array = np.asarray(page.asarray())
    except (OSError, ValueError, IndexError, tifffile.TiffFileError) as error:
        raise CaseError("unreadable", f"{path.name}: {error}") from None
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    return _without_alpha(array)


def _check_size(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise CaseError("too_large", f"{pixels} pixels")


def _without_alpha(array: NDArray[np.generic]) -> NDArray[np.generic]:
    if array.ndim == 3 and array.shape[-1] in (2, 4):
        return array[..., :-1]
    return array


def _hwc(array: NDArray[np.generic]) -> NDArray[np.generic]:
    if array.ndim == 2:
        return array[..., np.newaxis]
    if array.ndim != 3:
        raise CaseError("dimensions", f"the file has {array.ndim} dimensions")
    return array
