"""Updates as integers modulo 2^16, 2^24 or 2^32, and keystreams added to them.

A value x becomes round(x / limit * levels), where so many levels are used that the sum over all
sites of a round still has its sign. What is summed modulo 2^k is exact: it depends neither on the
order nor on who was masked with whom. Everything works in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from medfl.common.packing import Kind
from medfl.common.tensors import Array

Words = NDArray[Any]

_PIECE = 2**16


@dataclass(frozen=True, slots=True)
class Ring:
    """Integers modulo 256^width. width: bytes of one number on the wire: 2, 3 or 4."""

    width: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the words that are worked with; three bytes are worked with as four."""
        return np.dtype("<u2" if self.width == 2 else "<u4")

    def levels(self, sites: int) -> int:
        """The largest integer of one site, so that the sum of `sites` of them keeps its sign."""
        largest: int = 2 ** (8 * self.width - 1) - 1
        return largest // sites


# What a study says updates travel as; masked numbers cannot be compressed, and a sum of many
# hospitals does not fit in one byte.
RINGS: dict[Kind, Ring] = {
    "float32": Ring(4),
    "float16": Ring(3),
    "int8": Ring(2),
    "int4": Ring(2),
}


def encode(values: Array, factor: float, levels: int, ring: Ring) -> tuple[Words, int]:
    """round(values * factor) within -levels..levels as words, and how many were beyond it.

    values: (n,) finite floats. The product and its rounding (half to even) are in float64.
    """
    words = np.empty(len(values), ring.dtype)
    beyond = 0
    for piece in _pieces(len(values)):
        scaled = np.rint(values[piece].astype(np.float64) * factor)
        beyond += int(np.count_nonzero(np.abs(scaled) > levels))
        whole = np.clip(scaled, -levels, levels).astype(np.int64)
        words[piece] = whole.astype(ring.dtype)  # modulo the ring, as two's complement
    return words, beyond


def signed(words: Words, ring: Ring) -> NDArray[np.int64]:
    """Words of the ring as the integers of least size that they stand for."""
    if ring.width == 2:
        return words.view("<i2").astype(np.int64)
    shift = 32 - 8 * ring.width
    return ((words << np.uint32(shift)).view("<i4") >> shift).astype(np.int64)


def add_stream(total: Words, key: bytes, sign: int) -> None:
    """total += sign * ChaCha20 keystream of `key`, in place.

    key: 32 bytes, used for one stream and never again (RFC 8439 with an all-zero nonce).
    """
    cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    zeros = bytes(_PIECE * total.itemsize)
    stream = bytearray(len(zeros))
    words = np.frombuffer(stream, total.dtype)
    change = np.add if sign > 0 else np.subtract
    for piece in _pieces(len(total)):
        n = piece.stop - piece.start
        cipher.update_into(memoryview(zeros)[: n * total.itemsize], stream)
        change(total[piece], words[:n], out=total[piece])


def to_wire(words: Words, ring: Ring) -> Array:
    """(n,) words as they travel; three bytes as (n, 3)."""
    if ring.width != 3:
        return words
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4)[:, :3])


def from_wire(sent: Array, n: int, ring: Ring) -> Words | None:
    """Inverse of `to_wire`; None where it is not `n` numbers of the ring."""
    if ring.width != 3:
        return sent if sent.dtype == ring.dtype and sent.shape == (n,) else None
    if sent.dtype != np.uint8 or sent.shape != (n, 3):
        return None
    wide = np.zeros((n, 4), np.uint8)
    wide[:, :3] = sent
    return wide.reshape(-1).view("<u4")


def _pieces(n: int) -> Iterator[slice]:
    return (slice(i, min(n, i + _PIECE)) for i in range(0, n, _PIECE))
