"""Arithmetic block by block has the bits of arithmetic on whole arrays, in memory and at rest."""

from __future__ import annotations

import numpy as np
import pytest

from medfl.common import resting
from medfl.strategies import blocks
from medfl.strategies.blocks import by_block
from medfl.strategies.catalogue import STRATEGIES
from medfl.strategies.strategy import ServerState, Strategy

Weights = dict[str, np.ndarray]


def test_each_block_of_each_output_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two: the last one is short."""
    monkeypatch.setattr(blocks, "_BLOCK", 2)
    left = {"w": np.array([[1.0, -2.0, 3.0]], np.float32), "unasked": np.ones(1, np.float32)}
    total, product = {"w": np.empty((1, 3), np.float32)}, {"w": np.empty((1, 3), np.float32)}
    by_block(lambda a, b: (a + b, a * b), [left, {"w": np.full((1, 3), 2.0)}], [total, product])
    assert total["w"].tolist() == [[3.0, 0.0, 5.0]]
    assert product["w"].tolist() == [[2.0, -4.0, 6.0]]


def stepped(strategy: Strategy) -> tuple[Weights, ServerState]:
    rng = np.random.default_rng(5)
    weights: Weights = {
        "w": rng.normal(size=(700, 301)).astype(np.float32),
        "b": rng.normal(size=3).astype(np.float32),
        "count": np.array(7),
    }
    state = ServerState()
    for _ in range(3):
        delta = {n: rng.normal(size=weights[n].shape).astype(np.float32) for n in ("w", "b")}
        before = {n: d.copy() for n, d in delta.items()}
        weights, state = strategy.server_step(weights, delta, state)
        assert all((delta[n] == before[n]).all() for n in delta)
    return weights, state


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_a_server_step_has_the_same_bits_whatever_rests_and_however_it_is_cut(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, state = stepped(STRATEGIES[name]())
    monkeypatch.setattr(resting, "IN_MEMORY_BYTES", 8)
    monkeypatch.setattr(resting, "WINDOW", 10_000)
    monkeypatch.setattr(blocks, "_BLOCK", 777)
    at_rest, other = stepped(STRATEGIES[name]())
    assert list(at_rest) == list(in_memory)
    for key, array in in_memory.items():
        np.testing.assert_array_equal(at_rest[key], array)
    for slot, group in state.slots.items():
        for key, array in group.items():
            np.testing.assert_array_equal(other.slots[slot][key], array)
