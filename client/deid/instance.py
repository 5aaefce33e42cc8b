"""One file in, one de-identified file out, as bytes. Runs in the limited child process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from medfl import __version__
from medfl.client.deid import streams, table
from medfl.client.deid.keys import Pseudonyms
from medfl.client.deid.treat import context, treated
from medfl.client.readers.dicom_pixels import check_burned_in
from medfl.common.errors import CaseError
from medfl.common.site import Deid

# Streams of video carry sound and texts of their own.
_VIDEO = ("1.2.840.10008.1.2.4.10", "1.2.840.10008.1.2.7")
_JPEG_LIKE = ("1.2.840.10008.1.2.4.", "1.2.840.10008.1.2.5")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# Who wrote the file (PS3.10 section 7.1): medfl, whichever version.
_IMPLEMENTATION = "2.25.157952726696474249104752743028454633103"
_DATES_MODIFIED = {"full": "UNMODIFIED", "shifted": "MODIFIED", "none": "REMOVED"}


def deidentified(
    path: Path, kind: str, options: Deid, pseudonyms: Pseudonyms
) -> tuple[str, Dataset]:
    """Whose image it is, and the image in `path`, checked before, without what says so.

    kind: its SOP class. Raises CaseError for what must not be passed on.
    """
    dataset = dcmread(path)
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    if syntax.startswith(_VIDEO):
        raise CaseError("dicom_codec", "video")
    check_burned_in(dataset, str(dataset.get("Modality", "")), kind)
    whose = context(dataset, options, pseudonyms)
    result = treated(dataset, whose)
    _clean_pixels(dataset, result, UID(syntax))
    _declare(result, options)
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = UID(syntax)
    result.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION)
    result.file_meta.ImplementationVersionName = "MEDFL"
    result.SOPClassUID = result.file_meta.MediaStorageSOPClassUID = UID(kind)
    result.file_meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID
    return whose.patient, result


def as_file(dataset: Dataset) -> bytes:
    """The data set as a DICOM file with an empty preamble."""
    dataset.preamble = bytes(128)
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _declare(result: Dataset, options: Deid) -> None:
    """Say what was done (PS3.15 section E.1.1, PS3.3 C.7.1.1 and C.12.1)."""
    result.PatientIdentityRemoved = "YES"
    method = f"medfl {__version__}, PS3.15 {table.EDITION} Annex E"
    result.DeidentificationMethod = method
    codes = []
    for value, meaning in table.method_codes(options):
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
        codes.append(code)
    result.DeidentificationMethodCodeSequence = Sequence(codes)
    modified = _DATES_MODIFIED[options.retain_longitudinal]
    result.LongitudinalTemporalInformationModified = modified


def _clean_pixels(dataset: Any, result: Dataset, syntax: UID) -> None:
    name = next((n for n in _PIXELS if n in result), None)
    if name is None:
        raise CaseError("dicom_truncated", "the image has no pixel data")
    element = result[name]
    if syntax.is_encapsulated:
        element.value = streams.clean_fragments(element.value)
        element.is_undefined_length = True
        return
    size = _picture_bytes(dataset, name)
    if size is not None and not syntax.is_little_endian:
        # In words of the other order the last byte stands before the padding.
        size += size % 2
    if size is not None and size < len(element.value):
        # Bytes behind the picture, up to the even length that DICOM wants.
        element.value = element.value[:size] + bytes(size % 2)
    if name == "PixelData" and _overlays_inside(dataset):
        element.value = _without_overlays(dataset, element.value, syntax)


def _picture_bytes(dataset: Any, name: str) -> int | None:
    if name != "PixelData" or dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
        return None
    samples = int(dataset.get("SamplesPerPixel") or 1) * int(dataset.get("NumberOfFrames") or 1)
    bits = int(dataset.Rows) * int(dataset.Columns) * samples * int(dataset.BitsAllocated)
    return (bits + 7) // 8


def _overlays_inside(dataset: Any) -> bool:
    """Overlays of old lie in bits of the pixels that the picture does not use (PS3.5 8.1.2)."""
    groups = {tag >> 16 for tag in dataset.keys() if 0x6000 <= tag >> 16 <= 0x60FF}
    return any(((group << 16) | 0x3000) not in dataset for group in groups)


def _without_overlays(dataset: Any, pixels: bytes, syntax: UID) -> bytes:
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    high = int(dataset.get("HighBit", stored - 1))
    if allocated not in (8, 16, 32) or not 0 < stored <= high + 1 <= allocated:
        raise CaseError("dicom_pixels", f"{stored} of {allocated} bits up to bit {high}")
    order = "<" if syntax.is_little_endian else ">"
    mask = ((1 << stored) - 1) << (high + 1 - stored)
    values = np.frombuffer(pixels, dtype=f"{order}u{allocated // 8}") & mask
    if int(dataset.get("PixelRepresentation") or 0) and high == stored - 1:
        # The sign is repeated above the highest stored bit, as most writers do.
        sign = values >> (stored - 1)
        values = values | (sign * (((1 << allocated) - 1) ^ mask))
    return values.astype(f"{order}u{allocated // 8}").tobytes()
