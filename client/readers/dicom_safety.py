"""What is checked of a DICOM file before anything in it is believed. Runs in the limited child."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

from medfl.common.errors import CaseError

# A preamble may hold anything (PS3.10 section 7.1), and so a program: CVE-2019-11687.
_PROGRAMS = (b"MZ", b"\x7fELF", b"#!", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe")
_DEFLATED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.8.1")
_INFLATED_FREE = 32 * 1024**2
_INFLATED_RATIO = 20
_DEEPEST = 32
_MAX_PIXEL_BYTES = 2 * 1024**3
# Lossy JPEG 2000 of an empty background reaches some hundreds to one.
_MAX_COMPRESSION = 2000
# Trailing bytes that writers add to come to an even or aligned length.
_PADDING = 15
# Bits a sample; 0 where the header says it.
_PIXEL_BITS = {"PixelData": 0, "FloatPixelData": 32, "DoubleFloatPixelData": 64}


def check_start(path: Path) -> str:
    """The transfer syntax of a plain DICOM file whose start is harmless.

    Raises:
        CaseError: "not_a_plain_file", "not_dicom", "dicom_preamble", "dicom_truncated" or
            "dicom_deflated".
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise CaseError("not_a_plain_file", path.name)
    with path.open("rb") as file:
        start = file.read(144)
    if start[128:132] != b"DICM":
        raise CaseError("not_dicom", path.name)
    if start.startswith(_PROGRAMS):
        raise CaseError("dicom_preamble", path.name)
    from pydicom.filereader import read_file_meta_info

    meta = read_file_meta_info(path)
    if "TransferSyntaxUID" not in meta:
        raise CaseError("dicom_truncated", "the header names no transfer syntax")
    syntax = str(meta.TransferSyntaxUID)
    if syntax == _DEFLATED[0]:
        _check_deflated(path, start)
    return syntax


def _check_deflated(path: Path, start: bytes) -> None:
    """Inflate in small pieces and count, keeping nothing."""
    if len(start) < 144 or start[132:136] != b"\x02\x00\x00\x00":
        raise CaseError("dicom_truncated", "the header names no length")
    offset = 144 + struct.unpack("<L", start[140:144])[0]
    limit = _INFLATED_FREE + _INFLATED_RATIO * path.stat().st_size
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 16):
            while block:
                total += len(inflater.decompress(block, 1 << 20))
                if total > limit:
                    raise CaseError("dicom_deflated", f"more than {limit} bytes")
                block = inflater.unconsumed_tail


def check_depth(dataset: Any) -> None:
    """Raises CaseError("dicom_nesting") where sequences lie in each other too deep."""
    from pydicom.datadict import dictionary_has_tag, dictionary_VR

    waiting = [(dataset, 0)]
    while waiting:
        current, depth = waiting.pop()
        if depth > _DEEPEST:
            raise CaseError("dicom_nesting")
        for tag in list(current.keys()):
            kind = current.get_item(tag, keep_deferred=True).VR
            if kind is None and dictionary_has_tag(tag):
                kind = dictionary_VR(tag)
            if kind == "SQ":
                waiting += [(item, depth + 1) for item in current[tag].value or ()]


def check_pixels(dataset: Any, path: Path, *, compressed: bool) -> None:
    """The declared size against what is there.

    Raises:
        CaseError: "dicom_truncated" (too little), "dicom_pixels" (too much, or absurd).
    """
    name = next((n for n in _PIXEL_BITS if n in dataset), None)
    if name is None:
        raise CaseError("dicom_truncated", "the image has no pixel data")
    declared = _declared_bytes(dataset, name, compressed=compressed)
    if declared > _MAX_PIXEL_BYTES:
        raise CaseError("dicom_pixels", f"{declared} bytes declared")
    raw = dataset.get_item(name, keep_deferred=True)
    if compressed:
        # Compressed pixels have no length of their own; they cannot be larger than their file.
        if declared > path.stat().st_size * _MAX_COMPRESSION:
            raise CaseError("dicom_pixels", f"{declared} bytes declared in a small file")
        return
    if raw.value is None and raw.value_tell + raw.length > path.stat().st_size:
        raise CaseError("dicom_truncated", "the file ends within the pixel data")
    present = raw.length if raw.value is None else len(raw.value)
    if present < declared:
        raise CaseError("dicom_truncated", f"{present} of {declared} bytes of pixel data")
    if present > declared + _PADDING:
        raise CaseError("dicom_pixels", f"{present} bytes of pixel data for {declared}")


def _declared_bytes(dataset: Any, name: str, *, compressed: bool) -> int:
    """Uncompressed size of all frames, from the header alone. Raises CaseError("dicom_pixels")."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    frames = int(dataset.get("NumberOfFrames") or 1)
    bits = _PIXEL_BITS[name] or int(dataset.BitsAllocated)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if min(rows, columns, frames, bits, samples) < 1:
        raise CaseError("dicom_pixels", f"{rows} × {columns} × {frames}")
    if dataset.get("PhotometricInterpretation") == "YBR_FULL_422" and not compressed:
        # Two luminance samples share one pair of colour samples (PS3.3 C.7.6.3.1.2).
        samples = 2
    return (rows * columns * frames * samples * bits + 7) // 8
