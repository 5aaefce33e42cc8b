"""Random numbers that nobody can predict: a keystream of AES-256, and Gaussian noise made from it.

Differential privacy holds only against somebody who cannot compute the noise. torch's and numpy's
generators can be wound back from what they gave; AES-256 in counter mode (NIST SP 800-38A, section
6.5) under a key from the operating system cannot. A simulation hands in a key made from its seed,
so that it can be repeated; everybody else gets a fresh one. Processors have AES built in: a word
takes 1.5 ns on one that needs 6.7 for ChaCha20.

Floating-point numbers do not fill the line evenly, and a single transformed uniform can give away
what it was added to (Mironov 2012). Each number here adds up two Gaussian ones from separate pairs
of uniforms (after Holohan and Braghin 2021, "Secure random sampling in differential privacy",
section 4): behind two released numbers stand 4 x 52 bits, so whoever wants to invert them has 104
to guess and finds a match for nearly every sum.

On a GPU the numbers are made by the processor and copied; a cipher in the GPU's own integers, a
block a thread, would be faster there.
"""

from __future__ import annotations

import hashlib
import hmac
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from numpy.typing import NDArray

KEY_BYTES = 32
# A name is three of a block's four words of 32 bits; the fourth counts blocks.
NAME_WORDS = 3
# Numbers made at once: their pieces stay in the processor's second cache, and are large enough for
# torch to use every core that it was given. Even, because numbers are made in pairs.
AT_ONCE = 2**16
# A double with this exponent and any 52 bits behind it lies in [1, 2).
_ONE_TO_TWO = np.uint64(1023 << 52)
# What is enciphered: the keystream itself comes out.
_ZEROS = memoryview(bytes(16 * AT_ONCE))


def fresh_key() -> bytes:
    """A key that exists nowhere else."""
    return os.urandom(KEY_BYTES)


def key_from(seed: int, *purpose: str | int) -> bytes:
    """The key of a simulation, from its seed: who knows the seed can take the noise off again."""
    text = "\x1f".join(["medfl-simulated-key", str(seed), *map(str, purpose)])
    return hashlib.sha256(text.encode()).digest()


def words_by_name(
    key: bytes, purpose: str, names: NDArray[np.uint32], n: int
) -> NDArray[np.uint32]:
    """(len(names), n) uniform 32-bit words, each row a function of key, purpose and its name alone.

    names: (rows, 3). AES of distinct blocks, a name and a count each, under a key of the purpose: a
    row is the same whatever other rows there are, and nobody can tell it from chance.
    """
    blocks = np.empty((len(names), -(-n // 4), 4), dtype="<u4")
    blocks[:, :, :NAME_WORDS] = names[:, None]
    blocks[:, :, NAME_WORDS] = np.arange(blocks.shape[1])
    own = hmac.digest(key, f"by name\x1f{purpose}".encode(), "sha256")
    # One block is never enciphered twice under one key, so that the plain mode shows nothing.
    made = Cipher(AES(own), ECB()).encryptor().update(blocks.tobytes())
    return np.frombuffer(made, dtype="<u4").reshape(len(names), 4 * blocks.shape[1])[:, :n]


class Keystream:
    """Endless random bits of one key for one purpose; two purposes share none.

    Raises:
        ValueError: the key has not 32 bytes.
    """

    def __init__(self, key: bytes, purpose: str) -> None:
        if len(key) != KEY_BYTES:  # AES would take shorter ones
            raise ValueError(f"A key has {KEY_BYTES} bytes, not {len(key)}.")
        # The last 8 bytes count blocks of 16 bytes, the others are the purpose.
        first = hashlib.sha256(purpose.encode()).digest()[:8] + bytes(8)
        self._bits = Cipher(AES(key), CTR(first)).encryptor()

    def words(self, n: int) -> NDArray[np.uint64]:
        """(n,) uniform 64-bit words."""
        made = np.empty(n, dtype="<u8")
        zeros = _ZEROS[: 8 * n] if 8 * n <= len(_ZEROS) else bytes(8 * n)
        self._bits.update_into(zeros, made.data.cast("B"))
        return made

    def uniforms(self, n: int) -> NDArray[np.float64]:
        """(n,) numbers in (0, 1], multiples of 2^-53."""
        bits = self.words(n)
        bits >>= np.uint64(11)
        bits += np.uint64(1)
        return bits.astype(np.float64) * 2.0**-53

    def normals(self, n: int) -> NDArray[np.float64]:
        """(n,) standard normal numbers; an odd n leaves one unused."""
        made = np.empty(n + n % 2)
        for first in range(0, len(made), AT_ONCE):
            self._fill(made[first : first + AT_ONCE])
        return made[:n]

    def _fill(self, made: NDArray[np.float64]) -> None:
        """(2 m,) in place: twice m pairs of Box and Muller (1958), added up and not halved.

        The Gaussian pair is sqrt(-2 ln u) (cos a, sin a); the sum of two has variance 2, so that
        the two constants cancel.
        """
        # Torch's float64 sine and cosine use the processor's vectors; numpy's take 5 times longer.
        import torch

        m = len(made) // 2
        bits = self.words(4 * m)
        bits >>= np.uint64(12)
        bits |= _ONE_TO_TWO
        numbers = torch.from_numpy(bits.view(np.float64))
        radius = numbers[: 2 * m].neg_().add_(2.0).log_().neg_().sqrt_()
        # From 2 pi to 4 pi: one turn like any other.
        angle = numbers[2 * m :].mul_(2.0 * np.pi)
        along, across = angle.cos().mul_(radius), angle.sin_().mul_(radius)
        found = torch.from_numpy(made)
        torch.add(along[:m], along[m:], out=found[:m])
        torch.add(across[:m], across[m:], out=found[m:])
