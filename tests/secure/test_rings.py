"""Updates as integers of a ring, and keystreams over them."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from medfl.common.secure.rings import RINGS, Ring, add_stream, encode, from_wire, signed, to_wire


def test_a_value_becomes_the_nearest_level() -> None:
    words, beyond = encode(np.float32([0.5, -0.25, 2.0, -9.0]), 100.0, 150, Ring(2))
    assert signed(words, Ring(2)).tolist() == [50, -25, 150, -150]
    assert words[1] == 2**16 - 25
    assert beyond == 2


@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
def test_the_sum_of_the_largest_values_of_all_sites_keeps_its_sign(ring: Ring) -> None:
    for sites in (2, 3, 10, 100):
        most = ring.levels(sites)
        for value in (1.0, -1.0):
            words, beyond = encode(np.full(3, value), most, most, ring)
            total = np.zeros(3, ring.dtype)
            for _ in range(sites):
                total += words
            assert signed(total, ring).tolist() == [value * most * sites] * 3
            assert beyond == 0
        # One level more would not fit.
        assert (most + 1) * sites > 2 ** (8 * ring.width - 1) - 1


@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
def test_words_travel_in_as_many_bytes_as_the_ring_has(ring: Ring) -> None:
    words, _ = encode(np.arange(-50, 50, dtype=np.float32), 1.0, 50, ring)
    sent = to_wire(words, ring)
    assert sent.nbytes == 100 * ring.width
    back = from_wire(sent, 100, ring)
    assert back is not None
    assert signed(back, ring).tolist() == list(range(-50, 50))
    assert from_wire(sent[:99], 100, ring) is None
    assert from_wire(sent.astype(np.float32), 100, ring) is None


def test_a_stream_is_chacha20_of_its_key() -> None:
    """The first block is that of RFC 8439, appendix A.1, test vector 1: key and nonce zero."""
    total = np.zeros(4, "<u4")
    add_stream(total, bytes(32), 1)
    assert total.tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


@pytest.mark.parametrize("n", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 200_000])
def test_a_stream_is_the_same_in_pieces_as_in_one(n: int) -> None:
    total = np.arange(n, dtype="<u4")
    add_stream(total, b"k" * 32, 1)
    whole = Cipher(ChaCha20(b"k" * 32, bytes(16)), mode=None).encryptor().update(bytes(4 * n))
    assert (total == np.arange(n, dtype="<u4") + np.frombuffer(whole, "<u4")).all()
    add_stream(total, b"k" * 32, -1)
    assert (total == np.arange(n)).all()
