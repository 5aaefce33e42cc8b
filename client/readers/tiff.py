"""TIFF pictures as their tags say they are to be seen (TIFF 6.0, sections 6, 8, 16 and 18)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import CaseError

# Above this a picture is a decompression bomb or a slide, which these readers do not serve.
MAX_PIXELS = 400_000_000
_MINISWHITE, _RGB, _PALETTE, _SEPARATED, _YCBCR = 0, 2, 3, 5, 6
_PLAIN = (0, 1, 2, 3, 4, 5)
_JPEG = (6, 7)
_ALPHA = (1, 2)

Array = NDArray[Any]


def read_tiff(path: Path, channels: int | None) -> Array:
    """(rows, columns) or (rows, columns, C), upright, white as the largest value, no alpha.

    channels: how many the study expects; where that is what the file has, an extra sample whose
    meaning the file does not give is one of them, else it is left.

    Raises:
        CaseError: "unreadable", "dimensions", "transparency", "too_large".
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = _only_page(file)
            array = np.asarray(page.asarray())
            if page.axes.startswith("S"):
                array = np.moveaxis(array, 0, -1)
            if array.ndim not in (2, 3) or page.axes not in ("YX", "YXS", "SYX"):
                raise CaseError("dimensions", f"the TIFF has the axes {page.axes}")
            return _upright(_seen(array, page, channels), page)
    except MemoryError:
        raise
    except CaseError:
        raise
    except Exception as error:  # noqa: BLE001  tifffile's decoders raise what they like
        raise CaseError("unreadable", f"{path.name}: {error}") from None


def _only_page(file: Any) -> Any:
    """The one picture of the file; smaller copies of it (previews) are passed over."""
    pages = [page for page in file.pages if not page.is_reduced]
    first = pages[0] if pages else file.pages[0]
    size = int(np.prod(first.shape))
    if size > MAX_PIXELS:
        raise CaseError("too_large", f"{size} pixels")
    if len(pages) > 1 or file.series[0].size > size:
        count = max(len(pages), file.series[0].size // max(1, size))
        raise CaseError("dimensions", f"the TIFF holds {count} pictures")
    return first


def _seen(array: Array, page: Any, channels: int | None) -> Array:
    array = _without_extra(array, page, channels)
    kind = int(page.photometric)
    if kind not in _PLAIN and not (kind == _YCBCR and int(page.compression) in _JPEG):
        raise CaseError("unreadable", f"colours of the kind {page.photometric.name}")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
        return 255 - array if kind == _MINISWHITE else array
    if kind == _MINISWHITE:
        return _turned(array, page)
    if kind == _PALETTE:
        table = np.asarray(page.colormap).T
        # 16-bit entries are 8-bit ones times 257, but for writers that leave them as they are.
        table = np.rint(table / 257 if table.max() > 255 else table).astype(np.uint8)
        return table[array]
    if kind == _SEPARATED:
        return _from_inks(array, page)
    return array


def _turned(array: Array, page: Any) -> Array:
    if array.dtype.kind == "u":
        return (1 << int(page.bitspersample)) - 1 - array
    if array.dtype.kind == "i":
        return np.asarray(~array)
    raise CaseError("unreadable", "zero is white, but of numbers without a largest one")


def _from_inks(array: Array, page: Any) -> Array:
    """CMYK as RGB, as Pillow does for JPEG. Other inks have no agreed colour."""
    inks = page.tags.get(332)
    if array.ndim != 3 or array.shape[-1] != 4 or (inks is not None and int(inks.value) != 1):
        raise CaseError("unreadable", "inks other than cyan, magenta, yellow and black")
    top = float((1 << int(page.bitspersample)) - 1)
    left = 1 - array.astype(np.float64) / top
    return np.rint(left[..., :3] * left[..., 3:] * top).astype(array.dtype)


def _without_extra(array: Array, page: Any, channels: int | None) -> Array:
    extra = [int(e) for e in page.extrasamples or ()]
    if array.ndim == 2 or len(extra) != 1:
        return array
    if extra[0] in _ALPHA:
        check_alpha(array[..., -1])
    elif array.shape[-1] == channels:
        return array
    kept = array[..., :-1]
    return kept[..., 0] if kept.shape[-1] == 1 else kept


def check_alpha(alpha: Array) -> None:
    """Raises CaseError("transparency") where some pixels are hidden and others are not."""
    if alpha.min() != alpha.max():
        raise CaseError("transparency", f"opacity from {alpha.min()} to {alpha.max()}")


def _upright(array: Array, page: Any) -> Array:
    tag = page.tags.get(274)
    orientation = 1 if tag is None else int(tag.value)
    if orientation > 4:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
