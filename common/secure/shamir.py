"""Shamir's secret sharing (Shamir 1979) in the field of integers modulo the prime 2^255 - 19.

A kept library was looked at: pycryptodome shares 16 bytes at a time in GF(2^128) and works out the
interpolation anew for each secret. Two secrets of 32 bytes for 100 sites at a threshold of 67 cost
it 0.2 s a site and 19 s a round at the coordinator; here the same holders' weights serve all
secrets. A secret below the prime fits the 32 bytes of an X25519 key, and so does a share.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

PRIME = 2**255 - 19
BYTES = 32


def new_secret() -> int:
    """A uniform element of the field, from the operating system."""
    return secrets.randbelow(PRIME)


def split(
    secret: int, threshold: int, holders: int, draw: Callable[[], int] = new_secret
) -> list[int]:
    """The shares of the holders 1..`holders`; any `threshold` of them give the secret back.

    draw: a new uniform element; fewer shares than the threshold say nothing only if it is.
    """
    if not (0 <= secret < PRIME and 1 <= threshold <= holders < PRIME):
        raise ValueError("the secret is no element of the field, or the threshold cannot be met")
    polynomial = [secret, *(draw() for _ in range(threshold - 1))]
    return [_at(polynomial, x) for x in range(1, holders + 1)]


def weights_at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange's weights: f(0) = sum of weight_i f(point_i) for each f of degree < len(points)."""
    if len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise ValueError("holders are different and count from 1")
    weights = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights


def join(weights: Sequence[int], shares: Sequence[int]) -> int:
    """The secret, from the shares of the holders that `weights` was made for, in their order."""
    return sum(w * y for w, y in zip(weights, shares, strict=True)) % PRIME


def _at(polynomial: Sequence[int], x: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
