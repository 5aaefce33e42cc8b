"""Named arrays: the form in which weights, updates and sums travel and rest."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import StorageError
from medfl.common.private_files import sync_folder

Array = NDArray[Any]
Tensors = Mapping[str, Array]

_PIECE = 2**14


def l2_norm(tensors: Tensors) -> float:
    """Euclidean norm over all floating entries, accumulated in float64."""
    return math.sqrt(math.fsum(_square_sum(a) for a in floats(tensors).values()))


def _square_sum(array: Array) -> float:
    """In pieces that stay in the cache as float64, which is several times faster."""
    flat = array.ravel()
    pieces = (flat[i : i + _PIECE] for i in range(0, len(flat), _PIECE))
    return math.fsum(float(np.square(piece, dtype=np.float64).sum()) for piece in pieces)


def all_finite(tensors: Tensors) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(np.isfinite(a).all()) for a in tensors.values())


def floats(tensors: Tensors) -> dict[str, Array]:
    """The entries that can be averaged; integer buffers (a batch counter) cannot."""
    return {name: a for name, a in tensors.items() if np.issubdtype(a.dtype, np.floating)}


def subtract(left: Tensors, right: Tensors) -> dict[str, Array]:
    """left - right for each floating name of `left`."""
    return {name: np.subtract(a, right[name]) for name, a in floats(left).items()}


def add(left: Tensors, right: Tensors) -> dict[str, Array]:
    """left + right where `right` has the name, else left unchanged."""
    return {name: np.add(a, right[name]) if name in right else a for name, a in left.items()}


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name], order="C")
        sha.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def save(tensors: Tensors, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one atomic step: a reader sees the old file or the new one.

    Raises:
        StorageError: the disk refused; the old file, if any, is untouched.
    """
    from safetensors.numpy import save as to_bytes

    # Not ascontiguousarray, which turns a scalar (a batch counter) into an array of one.
    contiguous = {name: np.asarray(a, order="C") for name, a in tensors.items()}
    write_atomic(path, _in_order(to_bytes(contiguous, dict(metadata or {}))))


def _in_order(file: bytes) -> bytes:
    """The same safetensors file with sorted metadata: as written, their order is random."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + file[end:]


def load(path: Path) -> dict[str, Array]:
    """Read a safetensors file.

    Raises:
        StorageError: missing, or not a safetensors file (a pickled .pt file is refused here).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise StorageError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise StorageError(f"{path}: could not be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise StorageError(
            f"{path}: is not a whole safetensors file ({error}). medfl reads no other format for "
            "weights; convert a .pt file on a machine that trusts it"
        ) from None


def metadata(path: Path) -> dict[str, str]:
    """What was written beside the arrays of a file that `load` can read."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def write_atomic(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write next to `path`, flush to disk, then rename over it. Raises StorageError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for chunk in [content] if isinstance(content, bytes) else content:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: could not be written ({error.strerror}). Free some space or name another "
            "folder, then run the same command again"
        ) from None
