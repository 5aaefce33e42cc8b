"""The limited child process: reads headers, images and segmentations, and answers in frames."""

from __future__ import annotations

import os
import resource
import struct
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from medfl.client.readers import dicom_contours, dicom_pixels, dicom_segments
from medfl.client.readers.dicom_safety import check_depth, check_pixels, check_start
from medfl.client.readers.sandbox import encode, read_request
from medfl.common.errors import CaseError

# What damaged files make pydicom and its decoders raise; anything else is told as unforeseen.
_PARSE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
# An RT Structure Set.
_CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")


def open_checked(path: Path) -> Any:
    """The parsed header of an image whose declared size fits. Raises CaseError."""
    try:
        syntax = check_start(path)
        # Large values stay on disk, so that a header is read without its pixels.
        lazy = 1024 if syntax != "1.2.840.10008.1.2.1.99" else None
        dataset = dcmread(path, defer_size=lazy)
        check_depth(dataset)
        if _is_image(dataset):
            check_pixels(dataset, path, compressed=UID(syntax).is_compressed and lazy is not None)
        return dataset
    except RecursionError:
        raise CaseError("dicom_nesting") from None
    except MemoryError:
        raise CaseError("dicom_worker", "not enough memory") from None
    except InvalidDicomError:
        raise CaseError("not_dicom", path.name) from None
    except _PARSE as error:
        raise CaseError("unreadable", f"{type(error).__name__}: {error}"[:200]) from None


def _is_image(dataset: Any) -> bool:
    """By its class, or because it declares rows; a cut file keeps its class in the meta header."""
    if "Rows" in dataset or "PixelData" in dataset:
        return True
    name = UID(_sop_class(dataset)).name
    if "SOPInstanceUID" not in dataset and _sop_class(dataset) != _MEDIA_DIRECTORY:
        raise CaseError("dicom_truncated", "the header ends before the instance is named")
    return "Image Storage" in name or _sop_class(dataset) in _SEGMENTATIONS


def _sop_class(dataset: Any) -> str:
    return str(dataset.file_meta.get("MediaStorageSOPClassUID") or dataset.get("SOPClassUID", ""))


def headers(request: dict[str, Any]) -> tuple[dict[str, Any], None]:
    """{"files": [...]} -> one dict a file: what grouping needs, or reason and detail."""
    found: list[dict[str, Any]] = []
    for name in request["files"]:
        try:
            found.append(_header(Path(name)))
        except CaseError as error:
            series = _series(Path(name))
            found.append({"reason": error.reason, "detail": error.detail, "series": series})
        except Exception as error:  # noqa: BLE001  one bad file costs its case
            found.append({**_unforeseen(error), "series": _series(Path(name))})
    return {"headers": found}, None


def _unforeseen(error: Exception) -> dict[str, Any]:
    """What no reader thought of; the place is for whoever mends the reader, and names no file."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    detail = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
    return {"reason": "reading_failed", "detail": detail}


def _series(path: Path) -> str:
    """The series that a file which cannot be used says that it is of; "" where it does not."""
    try:
        check_start(path)
        found = dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
        return str(found.get("SeriesInstanceUID") or "")
    except Exception:  # noqa: BLE001  then it does not say
        return ""


def contents(request: dict[str, Any]) -> tuple[dict[str, Any], None]:
    """{"files"} -> one SHA-256 a file of what it shows, of whom and where, however it is written.

    Raises CaseError where one of them cannot be decoded.
    """
    datasets = [open_checked(Path(name)) for name in request["files"]]
    return _decoding(lambda: ({"contents": [dicom_pixels.content(d) for d in datasets]}, None))


def _header(path: Path) -> dict[str, Any]:
    dataset = open_checked(path)
    kind = _sop_class(dataset)
    try:
        if kind == _MEDIA_DIRECTORY:
            _check_directory(dataset)
            raise CaseError("not_an_image", "DICOMDIR")
        if kind == _CONTOURS:
            return dicom_contours.contours_header(dataset)
        if not _is_image(dataset):
            raise CaseError("not_an_image", UID(kind).name)
        if kind in _SEGMENTATIONS:
            return dicom_segments.segmentation_header(dataset)
        return dicom_pixels.image_header(dataset, kind)
    except _PARSE as error:
        raise CaseError("unreadable", f"{type(error).__name__}: {error}"[:200]) from None


def _check_directory(dataset: Any) -> None:
    """A DICOMDIR is not followed; one that points out of its folder is reported."""
    for record in dataset.get("DirectoryRecordSequence", ()):
        parts = record.get("ReferencedFileID") or ()
        parts = [parts] if isinstance(parts, str) else list(parts)
        if any(p in ("..", "") or "/" in p or "\\" in p or "\0" in p for p in parts):
            raise CaseError("path_outside", "the DICOMDIR names a file outside its folder")


def image(request: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """{"files", "dimensions"} -> (C, *spatial) with affine and spacing."""
    datasets = [open_checked(Path(name)) for name in request["files"]]
    read = dicom_pixels.volume if request["dimensions"] == 3 else dicom_pixels.plane
    return _decoding(lambda: read(datasets))


def segmentation(request: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """{"mask", "files", "dimensions", "names"} -> class numbers on the image's grid."""
    mask = open_checked(Path(request["mask"]))
    datasets = [open_checked(Path(name)) for name in request["files"]]
    read = dicom_contours.mask if _sop_class(mask) == _CONTOURS else dicom_segments.mask
    return _decoding(lambda: read(mask, datasets, request))


def deidentify(request: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """{"file", "options", "secret", "look"} -> the de-identified file's bytes and its new names.

    options: of [deid]; secret: hex; look: also say whether text seems to be in the picture.
    """
    from medfl.client.deid.worker import deidentify_file

    path = Path(request["file"])
    dataset = open_checked(path)
    kind = _sop_class(dataset)
    if kind == _MEDIA_DIRECTORY or not _is_image(dataset):
        raise CaseError("not_an_image", UID(kind).name)
    if "Image Storage" not in UID(kind).name and kind not in _SEGMENTATIONS:
        # A class of a vendor's own, or one that carries texts.
        raise CaseError("not_an_image", "another class")
    return _decoding(lambda: deidentify_file(path, kind, request))


def _decoding(read: Callable[[], tuple[dict[str, Any], Any]]) -> tuple[dict[str, Any], Any]:
    try:
        return read()
    except MemoryError:
        raise CaseError("dicom_worker", "not enough memory") from None
    except _PARSE as error:
        raise CaseError("dicom_codec", f"{type(error).__name__}: {error}"[:200]) from None


_COMMANDS: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]] = {
    "headers": headers,
    "contents": contents,
    "image": image,
    "segmentation": segmentation,
    "deidentify": deidentify,
}


def limit(memory_bytes: int) -> None:
    """No more memory than this, no files written, no core dumps with patients' data in them."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    """Answer until the parent closes the pipe."""
    limit(int(sys.argv[1]))
    # Decoders in C++ may print; only frames may go to the parent.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while (request := read_request(sys.stdin.buffer)) is not None:
        try:
            answer = encode(*_COMMANDS[request["command"]](request))
        except CaseError as error:
            answer = encode({"reason": error.reason, "detail": error.detail})
        except MemoryError:
            answer = encode({"reason": "dicom_worker", "detail": "not enough memory"})
        except Exception as error:  # noqa: BLE001  else the parent would speak of memory or time
            answer = encode(_unforeseen(error))
        out.write(answer)
        out.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
