"""Updates as few bytes: numbers rounded as the study says, then packed without loss.

    float32  every bit as it is
    float16  half precision, each tensor first scaled by a power of two so that nothing overflows
    int8     per block of 256 numbers: value / (largest / 127), rounded to the nearest integer; what
             rounding took away is added to the site's next update (`pack_with_feedback`)
    int4     the same with largest / 7, two numbers a byte

The bytes of equal significance are laid side by side (byte shuffle), which is what makes signs and
exponents compress, and zstandard packs them. A packed group is one array `head` (JSON: version,
kind, names and shapes) and one array a segment of at most 2^20 numbers, so that neither side needs
more than a segment beside the model itself. `unpack` sets memory aside for nothing that the model
does not have: names, shapes and each segment's size are compared with it first.

Under differential privacy all of this is post-processing of what left DP-SGD (Dwork & Roth 2014,
Proposition 2.1), also the remembered rounding errors: it costs no privacy and gives none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medfl.common import resting
from medfl.common.errors import FederationError
from medfl.common.tensors import Array, Tensors

Kind = Literal["float32", "float16", "int8", "int4"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Kinds that round so coarsely that the next update has to make up for it.
WITH_FEEDBACK: tuple[Kind, ...] = ("int8", "int4")
Shapes = Mapping[str, tuple[int, ...]]
Flat = NDArray[np.float32]

_VERSION = 1
_HEAD = "head"
_BLOCK = 256
_SEGMENT = 2**20
# Beyond level 1 the bytes of network updates shrink by less than 1 %, at a multiple of the time.
_LEVEL = 1
# What a number is before it is packed; int4's are then put two to a byte.
_WIRE: dict[Kind, str] = {"float32": "<f4", "float16": "<f2", "int8": "i1", "int4": "i1"}


@dataclass(frozen=True, slots=True)
class Head:
    """What a packed group says about itself."""

    kind: Kind
    shapes: Shapes


@dataclass(frozen=True, slots=True)
class _Piece:
    """The numbers start..stop of one flattened tensor."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def pack(tensors: Tensors, kind: Kind) -> dict[str, Array]:
    """`tensors` (taken as float32) as arrays of uint8; `unpack` is the inverse up to rounding."""
    import zstandard

    flat = {name: np.asarray(a, dtype=np.float32).ravel() for name, a in tensors.items()}
    shapes = {name: tuple(a.shape) for name, a in tensors.items()}
    about = {"version": _VERSION, "kind": kind, "tensors": list(shapes.items())}
    packed = {_HEAD: _bytes(json.dumps(about, separators=(",", ":")).encode())}
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    for number, pieces in enumerate(_segments(shapes)):
        parts = [_ENCODE[kind](flat[p.name][p.start : p.stop]) for p in pieces]
        scales = np.concatenate([scale for scale, _ in parts]).astype("<f4")
        values = np.concatenate([value for _, value in parts]).astype(_WIRE[kind], copy=False)
        steps, raw = scales.tobytes(), _halves(values) if kind == "int4" else _shuffled(values)
        packed[str(number)] = _bytes(compressor.compress(steps + raw if steps else raw))
    return packed


def pack_exactly(tensors: Tensors) -> Tensors:
    """Packed as float32 where that saves bytes, else `tensors` themselves: both are exact.

    The head of a model with a handful of parameters would be longer than the parameters.
    """
    packed = pack(tensors, "float32")
    sizes = [sum(a.nbytes for a in group.values()) for group in (packed, tensors)]
    return packed if sizes[0] < sizes[1] else tensors


def is_packed(group: Tensors) -> bool:
    """Whether a group could be a packed one: plain parameters are never all bytes."""
    return bool(group) and all(a.dtype == np.uint8 for a in group.values())


def unpack(packed: Tensors, shapes: Shapes) -> dict[str, Array]:
    """The float32 tensors of a packed group, which must have exactly these names and shapes.

    Raises:
        FederationError: another content than `shapes`, another size than it would have, or damage.
            Nothing of the declared size has been set aside by then.
    """
    head = read_head(packed, shapes)
    if dict(head.shapes) != dict(shapes):
        raise _refused("holds other parameters than the model has")
    shapes = head.shapes  # the same ones in the sender's order, in which the numbers come
    segments = list(_segments(shapes))
    if packed.keys() != {_HEAD, *map(str, range(len(segments)))}:
        raise _refused("does not have the parts that its parameters need")
    sizes = [_raw_size(pieces, head.kind) for pieces in segments]
    for number, size in enumerate(sizes):
        _check_frame(packed[str(number)], size)
    flat = {name: np.empty(math.prod(shape), dtype=np.float32) for name, shape in shapes.items()}
    for number, (pieces, size) in enumerate(zip(segments, sizes, strict=True)):
        raw = _decompressed(packed[str(number)], size)
        resting.let_go(packed[str(number)])
        for piece, values in _decoded(raw, pieces, head.kind):
            flat[piece.name][piece.start : piece.stop] = values
    return {name: flat[name].reshape(shape) for name, shape in shapes.items()}


def pack_with_feedback(
    tensors: Tensors, residual: Tensors, kind: Kind
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Packed `tensors + residual`, and the next residual: what packing took away from that sum.

    Seide et al. 2014, section 3 (1-bit SGD); Karimireddy et al. 2019, Algorithm 2 (EF-SGD): over
    the rounds nothing is lost, only late. `residual` is empty before the first round.
    """
    wanted = {n: a + residual[n] if n in residual else a for n, a in tensors.items()}
    packed = pack(wanted, kind)
    sent = unpack(packed, {name: a.shape for name, a in wanted.items()})
    return packed, {name: np.asarray(a - sent[name], np.float32) for name, a in wanted.items()}


def read_head(packed: Tensors, shapes: Shapes) -> Head:
    """What a packed group declares, if it could be about a model of these shapes at all.

    Raises:
        FederationError: not a packed group, or a head longer than this model's could be.
    """
    head = packed.get(_HEAD)
    longest = 4096 + sum(6 * len(name) + 16 * (2 + len(shape)) for name, shape in shapes.items())
    if head is None or not all(a.dtype == np.uint8 and a.ndim == 1 for a in packed.values()):
        raise _refused("is not packed")
    if len(head) > longest:
        raise _refused("has a head that is too long")
    try:
        about = json.loads(head.tobytes())
        declared = {str(name): tuple(map(_size, shape)) for name, shape in about["tensors"]}
        kind, version = about["kind"], about["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _refused("has a head that cannot be read") from None
    if version != _VERSION or kind not in KINDS or len(declared) != len(about["tensors"]):
        raise _refused("is packed in a way that this version does not know")
    return Head(kind, declared)


def _size(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError("a length is a whole number")
    return number


def _segments(shapes: Shapes) -> Iterator[list[_Piece]]:
    """All numbers in order, cut so that a segment has at most `_SEGMENT` of them."""
    segment: list[_Piece] = []
    room = _SEGMENT
    for name, shape in shapes.items():
        start, end = 0, math.prod(shape)
        while start < end:
            # Cut at whole blocks, so that only a tensor's last block is short.
            stop = end if end - start <= room else start + room - room % _BLOCK
            if stop > start:
                segment.append(_Piece(name, start, stop))
                room -= stop - start
                start = stop
            if start < end or room == 0:
                yield segment
                segment, room = [], _SEGMENT
    if segment:
        yield segment


def _n_scales(n: int, kind: Kind) -> int:
    return {"float32": 0, "float16": 1}.get(kind, -(-n // _BLOCK))


def _raw_size(pieces: list[_Piece], kind: Kind) -> int:
    """Bytes of a segment before compression."""
    scales, numbers = sum(_n_scales(len(p), kind) for p in pieces), sum(map(len, pieces))
    if kind == "int4":
        return 4 * scales + -(-numbers // 2)
    return 4 * scales + np.dtype(_WIRE[kind]).itemsize * numbers


def _exactly(values: Flat) -> tuple[Flat, Array]:
    return np.empty(0, np.float32), values


def _halved(values: Flat) -> tuple[Flat, Array]:
    """A power of two and values / it, below 2^15 in size, to the nearest half float."""
    with np.errstate(over="ignore", invalid="ignore"):
        largest = float(np.abs(values).max())
        exponent = math.frexp(largest)[1] - 15 if math.isfinite(largest) else 0
        exponent = max(exponent, -126)  # the smallest normal power in float32
        scaled = np.ldexp(values, -exponent).astype(np.float16)
    return np.array([2.0**exponent], np.float32), scaled


def _quantised(largest: int, values: Flat) -> tuple[Flat, Array]:
    """Steps (one a block of 256) and values / step to the nearest of -largest..largest."""
    short = -len(values) % _BLOCK
    rows = np.pad(values, (0, short)).reshape(-1, _BLOCK)
    # Where a value is not finite its step is not either: the receiver sees it and refuses.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        steps = np.abs(rows).max(axis=1) / np.float32(largest)
        levels = np.rint(rows / np.where(steps > 0, steps, np.float32(1))[:, None])
    whole = np.nan_to_num(levels, nan=0.0).clip(-largest, largest).astype(np.int8)
    return steps, whole.ravel()[: len(values)]


_ENCODE: dict[Kind, Callable[[Flat], tuple[Flat, Array]]] = {
    "float32": _exactly,
    "float16": _halved,
    "int8": partial(_quantised, 127),
    "int4": partial(_quantised, 7),
}


def _decoded(raw: bytes, pieces: list[_Piece], kind: Kind) -> Iterator[tuple[_Piece, Flat]]:
    """The numbers of each piece of a segment."""
    counts = [_n_scales(len(p), kind) for p in pieces]
    scales = np.frombuffer(raw, "<f4", count=sum(counts))
    rest = memoryview(raw)[scales.nbytes :]
    if kind == "int4":
        values = _wholes(rest, sum(map(len, pieces)))
    else:
        values = _unshuffled(rest, np.dtype(_WIRE[kind]))
    first, start = 0, 0
    for piece, count in zip(pieces, counts, strict=True):
        own, mine = scales[first : first + count], values[start : start + len(piece)]
        first, start = first + count, start + len(piece)
        if kind in WITH_FEEDBACK:
            own = np.repeat(own, _BLOCK)[: len(piece)]
        with np.errstate(over="ignore", invalid="ignore"):  # admission looks for what is not finite
            yield piece, mine.astype(np.float32) * own if count else mine


def _halves(values: Array) -> bytes:
    """Two numbers of -7..7 a byte, as 1..15, the first one in the lower half."""
    nibbles = np.full(len(values) + len(values) % 2, 8, np.uint8)
    nibbles[: len(values)] += values.view(np.uint8)
    return (nibbles[0::2] | nibbles[1::2] << 4).tobytes()


def _wholes(raw: memoryview, n: int) -> Array:
    """The `n` numbers of `_halves`; a half byte of 0, which it never makes, is -8."""
    packed = np.frombuffer(raw, np.uint8)
    nibbles = np.empty(2 * len(packed), np.uint8)
    nibbles[0::2], nibbles[1::2] = packed & 15, packed >> 4
    return nibbles[:n].view(np.int8) - np.int8(8)


def _shuffled(values: Array) -> bytes:
    """All first bytes, then all second bytes, and so on."""
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _unshuffled(raw: memoryview, dtype: np.dtype[Any]) -> Array:
    """Plane by plane, which is several times faster than one transposed copy."""
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    values = np.empty(planes.shape[1], dtype)
    for number, plane in enumerate(planes):
        values.view(np.uint8).reshape(-1, dtype.itemsize)[:, number] = plane
    return values


def _bytes(content: bytes) -> Array:
    return np.frombuffer(content, dtype=np.uint8)


def _check_frame(packed: Array, size: int) -> None:
    """Raise FederationError unless the frame announces exactly `size` bytes."""
    import zstandard

    try:
        announced = zstandard.get_frame_parameters(packed[:32].tobytes()).content_size
    except zstandard.ZstdError:
        raise _refused("is damaged") from None
    if announced != size:
        raise _refused("would unpack to another size than its parameters have")


def _decompressed(packed: Array, size: int) -> bytes:
    import zstandard

    try:
        raw = zstandard.ZstdDecompressor().decompress(
            packed.data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError:
        raise _refused("is damaged") from None
    if len(raw) != size:
        raise _refused("is damaged")
    return raw


def _refused(why: str) -> FederationError:
    return FederationError(f"A packed update {why}; it is refused.")
