"""Seeds that depend on what they are for, never on the order in which things run."""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as derive(7, "site", "st-marys", "round", 3).

    SHA-256 of the parts: any number of workers that take the sites in any order get the same
    streams, and two purposes never share one.
    """
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
