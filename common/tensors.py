"""Named arrays: the form in which weights, updates and sums travel and rest."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import StorageError
from medfl.common.private_files import sync_folder
from medfl.common.resting import let_go

Array = NDArray[Any]
Tensors = Mapping[str, Array]

_PIECE = 2**14


def l2_norm(tensors: Tensors) -> float:
    """Euclidean norm over all floating entries, accumulated in float64."""
    return math.sqrt(math.fsum(_square_sum(a) for a in floats(tensors).values()))


def _square_sum(array: Array) -> float:
    """In pieces that stay in the cache as float64, which is several times faster."""
    squares = (np.square(piece, dtype=np.float64) for piece in _pieces(array, _PIECE))
    return math.fsum(float(square.sum()) for square in squares)


def _pieces(array: Array, size: int) -> Iterator[Array]:
    """The flattened array, `size` entries at a time."""
    flat = array.reshape(-1)
    return (flat[i : i + size] for i in range(0, len(flat), size))


def all_finite(tensors: Tensors) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(
        bool(np.isfinite(piece).all()) for a in tensors.values() for piece in _pieces(a, 2**18)
    )


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
        sha.update(raw_bytes(array))
        let_go(array)
    return sha.hexdigest()


def raw_bytes(array: Array) -> memoryview:
    """The bytes of an array in C order; not copied where they lie so."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data


def header(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """What a safetensors file begins with; the arrays' bytes follow in the order of `file_order`.

    A number of 8 bytes, little endian: the length of the JSON text, padded with spaces to 8.
    """
    about: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in file_order(tensors):
        array = tensors[name]
        stop = start + array.nbytes
        kind = _KINDS[array.dtype.newbyteorder("=").str[1:]]
        about[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


# numpy's names and safetensors'.
_KINDS = {
    **{"f8": "F64", "f4": "F32", "f2": "F16", "b1": "BOOL"},
    **{f"i{size}": f"I{8 * size}" for size in (1, 2, 4, 8)},
    **{f"u{size}": f"U{8 * size}" for size in (1, 2, 4, 8)},
}
_TYPES = {kind: np.dtype(name) for name, kind in _KINDS.items()}


def file_order(tensors: Tensors) -> list[str]:
    """Names with the widest numbers first, so that every array is aligned; then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def views(buffer: bytes | bytearray | memoryview) -> dict[str, Array]:
    """The arrays of a safetensors text, as views of it. Nothing is set aside or copied.

    Raises:
        ValueError: it is none: header, types, shapes and places must fit each other exactly.
    """
    raw = memoryview(buffer)
    begin = 8 + int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or begin > len(raw):
        raise ValueError("no header")
    try:
        about = json.loads(bytes(raw[8:begin]))
        about.pop("__metadata__", None)
        found = [
            (*_length_pair(a["data_offsets"]), str(n), _TYPES[a["dtype"]], tuple(a["shape"]))
            for n, a in about.items()
        ]
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise ValueError("no header") from None
    end, arrays = begin, {}
    for start, stop, name, kind, shape in sorted(found, key=lambda place: place[:2]):
        whole = all(type(n) is int and n >= 0 for n in shape)
        if not whole or begin + start != end or stop - start != kind.itemsize * math.prod(shape):
            raise ValueError("places that do not fit")
        end = begin + stop
        arrays[name] = np.frombuffer(raw[begin + start : end], kind).reshape(shape)
    if end != len(raw):
        raise ValueError("bytes that belong to nothing")
    return arrays


def _length_pair(offsets: Any) -> tuple[int, int]:
    start, stop = offsets
    if type(start) is not int or type(stop) is not int:
        raise ValueError("an offset is a whole number")
    return start, stop


def save(tensors: Tensors, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one atomic step: a reader sees the old file or the new one.

    Raises:
        StorageError: the disk refused; the old file, if any, is untouched.
    """

    def pieces() -> Iterator[bytes | memoryview]:
        yield header(tensors, metadata)
        for name in file_order(tensors):
            yield raw_bytes(tensors[name])
            let_go(tensors[name])

    write_atomic(path, pieces())


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


def write_atomic(
    path: Path, content: bytes | Iterable[bytes | memoryview], *, durable: bool = True
) -> None:
    """Write next to `path`, flush to disk, then rename over it. Raises StorageError.

    durable: whether it has to outlast a power cut; what a simulation can make again does not.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for chunk in [content] if isinstance(content, bytes) else content:
                file.write(chunk)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: could not be written ({error.strerror}). Free some space or name another "
            "folder, then run the same command again"
        ) from None
