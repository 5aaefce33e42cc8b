"""Seeds depend on their purpose, not on the order in which things run."""

from __future__ import annotations

import hashlib

from medfl.common.seeds import derive


def test_a_seed_is_the_first_63_bits_of_the_purposes_sha256() -> None:
    whole = hashlib.sha256(b"7\x1fsite\x1fa\x1fround\x1f3").hexdigest()
    assert derive(7, "site", "a", "round", 3) == int(whole[:16], 16) // 2


def test_a_seed_never_changes_between_versions() -> None:
    assert derive(0) == 0x5FECEB66FFC86F38 >> 1  # SHA-256 of "0" begins 5feceb66ffc86f38


def test_purposes_do_not_run_into_each_other() -> None:
    seeds = [
        derive(1, "site", "ab"),
        derive(1, "site", "a", "b"),
        derive(1, "sitea", "b"),
        derive(1, "site", "b", "a"),
        derive(2, "site", "ab"),
        derive(1, "site", 12),
        derive(1, "site", 1, 2),
        derive(11, "site", 2),
    ]
    assert len(set(seeds)) == len(seeds)


def test_seeds_fit_a_signed_64_bit_integer() -> None:
    seeds = [derive(s, "round", r) for s in range(20) for r in range(50)]
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert len(set(seeds)) == len(seeds)
