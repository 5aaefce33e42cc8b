"""From the numbers that a DICOM file stores to what they mean. Runs in the limited child.

The order is the standard's (PS3.3 C.11.1, PS3.4 N.2): stored value, modality LUT or rescale, and
only then the turning over of MONOCHROME1. Padding is known by its stored value (PS3.3 C.7.5.1.1.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import CaseError

Floats = NDArray[np.float32]

# Their values are physical (Hounsfield units, activity), so that turning them over would be wrong.
_MEASURED = ("CT", "PT", "NM", "RTDOSE")


def functional(dataset: Any, frame: int, sequence: str, keyword: str) -> Any:
    """A frame's attribute: per frame, else shared, else the file's own; None where absent."""
    groups = []
    if "PerFrameFunctionalGroupsSequence" in dataset:
        groups.append(dataset.PerFrameFunctionalGroupsSequence[frame])
    if "SharedFunctionalGroupsSequence" in dataset:
        groups.append(dataset.SharedFunctionalGroupsSequence[0])
    for group in groups:
        items = group.get(sequence)
        if items and keyword in items[0]:
            return items[0][keyword].value
    return dataset.get(keyword)


def stored_values(dataset: Any) -> NDArray[np.generic]:
    """Every frame as stored: (n, rows, columns) or (n, rows, columns, 3).

    Raises:
        CaseError: "dicom_codec" where a decoder fails, "dicom_pixels" where nothing is compressed.
    """
    try:
        values: NDArray[np.generic] = dataset.pixel_array
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  decoders raise what they like; it costs this file
        compressed = dataset.file_meta.TransferSyntaxUID.is_encapsulated
        reason = "dicom_codec" if compressed else "dicom_pixels"
        raise CaseError(reason, f"{type(error).__name__}: {error}"[:200]) from None
    samples = int(dataset.get("SamplesPerPixel") or 1)
    return values[np.newaxis] if values.ndim == (2 if samples == 1 else 3) else values


def frames(dataset: Any) -> Floats:
    """Every frame's values as the scanner means them: (n, rows, columns) or (n, rows, columns, 3).

    Rescaled or through the modality LUT, palettes looked up, MONOCHROME1 turned over so that bright
    means dense as in MONOCHROME2. Where the file says that a pixel is padding it is NaN; no
    other value is. Raises CaseError, "dicom_rescale" and "nan_values" among others.
    """
    values = stored_values(dataset)
    interpretation = str(dataset.PhotometricInterpretation)
    if interpretation == "PALETTE COLOR":
        return _colours(values, dataset)
    outside = padding(values, dataset) if values.ndim == 3 else None
    turned = interpretation == "MONOCHROME1" and dataset.get("Modality") not in _MEASURED
    meant = np.stack([_frame(v, dataset, n, turned=turned) for n, v in enumerate(values)])
    if not np.isfinite(meant if outside is None else meant[~outside]).all():
        raise CaseError("nan_values")
    if outside is not None:
        meant[outside] = np.nan
    return meant


def background(dataset: Any) -> float | None:
    """What padding means: air for CT, in Hounsfield units; None: the image's darkest value."""
    return -1000.0 if dataset.get("Modality") == "CT" else None


def filled(
    values: NDArray[np.generic], background: float | None
) -> tuple[NDArray[np.generic], NDArray[np.bool_] | None]:
    """NaN (padding) as the image's darkest value, at most `background`; and where it was.

    Raises:
        CaseError: "empty_image" where nothing but padding is there.
    """
    outside = np.isnan(values) if values.dtype.kind == "f" else np.zeros((), dtype=np.bool_)
    if not outside.any():
        return values, None
    if outside.all():
        raise CaseError("empty_image", "every pixel is padding")
    dark = float(np.nanmin(values))
    dark = dark if background is None else min(dark, background)
    return np.where(outside, np.float32(dark), values), outside


def _frame(stored: NDArray[Any], dataset: Any, number: int, *, turned: bool) -> Floats:
    lut = dataset.get("ModalityLUTSequence")
    if lut:
        first, entries = lookup_table(lut[0], dataset)
        place = np.clip(stored.astype(np.int64) - first, 0, len(entries) - 1)
        meant = entries[place]
        low, high = float(entries.min()), float(entries.max())
    else:
        slope, intercept = rescale(dataset, number)
        meant = stored.astype(np.float64) * slope + intercept
        low, high = (v * slope + intercept for v in _stored_range(stored, dataset))
    return np.asarray(low + high - meant if turned else meant, dtype=np.float32)


def rescale(dataset: Any, frame: int) -> tuple[float, float]:
    """(slope, intercept) of one frame; what is absent or empty is 1 or 0 (PS3.3 C.7.6.16.2.9).

    Raises:
        CaseError: "dicom_rescale" for a slope of zero and for what is no number.
    """
    found = []
    for keyword, usual in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        value = functional(dataset, frame, "PixelValueTransformationSequence", keyword)
        try:
            found.append(usual if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            raise CaseError("dicom_rescale", f"{keyword} is no number") from None
    if not np.isfinite(found).all() or found[0] == 0:
        raise CaseError("dicom_rescale", f"slope {found[0]:g}, intercept {found[1]:g}")
    return found[0], found[1]


def lookup_table(item: Any, dataset: Any) -> tuple[int, NDArray[np.float64]]:
    """(first stored value, entries) of a modality LUT of any depth up to 16 bits (PS3.3 C.11.1.1).

    Raises:
        CaseError: "dicom_rescale" where descriptor and data do not fit.
    """
    descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
    if descriptor is None or len(descriptor) != 3 or data is None:
        raise CaseError("dicom_rescale", "the lookup table has no descriptor or no data")
    count, first = int(descriptor[0]) or 65536, int(descriptor[1])
    if int(dataset.get("PixelRepresentation") or 0) and first > 32767:
        first -= 65536
    if isinstance(data, (bytes, bytearray)):
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        kind = "u1" if len(data) - len(data) % 2 < 2 * count else f"{order}u2"
        entries = np.frombuffer(data, kind, count=len(data) // np.dtype(kind).itemsize)
    else:
        entries = np.atleast_1d(np.asarray(data)).astype(np.int64)
        if len(entries) < count <= 2 * len(entries):  # two entries of 8 bits in each word
            entries = entries.astype("<u2").view("u1")
    if len(entries) < count:
        raise CaseError("dicom_rescale", f"{len(entries)} of {count} entries of the lookup table")
    return first, entries[:count].astype(np.float64)


def _stored_range(stored: NDArray[Any], dataset: Any) -> tuple[float, float]:
    """Smallest and largest value that the file could store."""
    bits = int(dataset.get("BitsStored") or 0)
    if stored.dtype.kind == "f" or not bits:
        return float(stored.min()), float(stored.max())
    half = 1 << (bits - 1)
    return (-half, half - 1) if int(dataset.get("PixelRepresentation") or 0) else (0, 2 * half - 1)


def padding(stored: NDArray[Any], dataset: Any) -> NDArray[np.bool_] | None:
    """Where Pixel Padding Value, or the range to Pixel Padding Range Limit, lies; None if nowhere.

    Float pixels have attributes of their own for the same.
    """
    kind = ""
    if stored.dtype.kind == "f":
        kind = "DoubleFloat" if "DoubleFloatPixelData" in dataset else "Float"
    value = dataset.get(f"{kind}PixelPaddingValue")
    if value is None or value == "":
        return None
    limit = dataset.get(f"{kind}PixelPaddingRangeLimit")
    ends = [value, value if limit is None or limit == "" else limit]
    if stored.dtype.kind != "f":
        ends = [_as_stored(int(end), dataset) for end in ends]
    outside = (stored >= min(ends)) & (stored <= max(ends))
    return outside if outside.any() else None


def _as_stored(value: int, dataset: Any) -> int:
    """A value in the pixels' own representation: writers exchange −2000 and 63536 (PS3.5 6.2)."""
    bits = int(dataset.BitsStored)
    signed = bool(int(dataset.get("PixelRepresentation") or 0))
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if low <= value <= high:
        return value
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value > high else value


def _colours(values: NDArray[np.generic], dataset: Any) -> Floats:
    """(n, rows, columns, 3) on the scale 0 to 255 of other colour images."""
    from pydicom.pixels.processing import apply_color_lut

    colours = np.stack([apply_color_lut(v, dataset) for v in values]).astype(np.float32)
    # 16-bit entries are 8-bit ones times 257, but for writers that leave them as they are.
    return np.asarray(colours / 257 if colours.max() > 255 else colours, dtype=np.float32)
