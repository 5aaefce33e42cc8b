"""Sums of updates: the same bits in memory and on disk, and little memory for either."""

from __future__ import annotations

import os

import numpy as np
import pytest

from medfl.common import resting
from medfl.common.errors import StorageError
from medfl.strategies.sums import Sum


def updates(n: int, size: int = 300_000) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [
        {
            "w": rng.normal(size=(size // 100, 100)).astype(np.float32),
            "scalar": np.array(rng.normal(), np.float32),
            "count": np.array(7),
        }
        for _ in range(n)
    ]


def total(tensors: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    made = Sum()
    for weight, one in enumerate(tensors, 1):
        made.add(one, 1.0 / weight)
    return made.divided(3.0)


def test_a_weighted_sum_is_the_one_worked_out_by_hand() -> None:
    made = Sum()
    made.add({"w": np.array([1.0, -2.0], np.float32)}, 3.0)
    made.add({"w": np.array([-0.5, 4.0], np.float32), "n": np.array(5)}, 2.0)
    means = made.divided(4.0)
    assert {n: a.tolist() for n, a in means.items()} == {"w": [0.5, 0.5]}
    assert means["w"].dtype == np.float32


def test_on_disk_the_sum_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor is no multiple of a block."""
    in_memory = total(updates(5))
    monkeypatch.setattr(resting, "IN_MEMORY_BYTES", 8)
    on_disk = total(updates(5))
    assert in_memory.keys() == on_disk.keys() == {"w", "scalar"}
    for name, array in in_memory.items():
        assert on_disk[name].shape == array.shape
        np.testing.assert_array_equal(on_disk[name], array)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resting, "IN_MEMORY_BYTES", 8)
    made = Sum()

    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match=r"No space left on device.*TMPDIR"):
        made.add(updates(1)[0], 1.0)
