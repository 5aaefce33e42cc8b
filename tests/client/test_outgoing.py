"""What leaves of an update, and what stays at the hospital until the next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medfl.client.outgoing import outgoing
from medfl.common import tensors
from medfl.common.packing import is_packed, unpack
from medfl.common.tensors import Array, Tensors

SHAPES = {"w": (3,)}


def delta(*values: float) -> dict[str, Array]:
    return {"w": np.array(values, dtype=np.float32)}


def opened(sent: Tensors) -> list[float]:
    return [float(v) for v in unpack(sent, SHAPES)["w"]]


def residuals(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.glob("residual_*"))


def test_float32_of_a_few_numbers_travels_as_it_is(tmp_path: Path) -> None:
    update = delta(1, 2, 3)
    assert outgoing(tmp_path, 1, update, "float32") == update
    assert residuals(tmp_path) == []


def test_float32_of_many_numbers_is_packed_where_that_saves_bytes(tmp_path: Path) -> None:
    zeros = {"w": np.zeros(10_000, dtype=np.float32)}
    assert is_packed(outgoing(tmp_path, 1, zeros, "float32"))


def test_int8_sends_next_round_what_rounding_took_away(tmp_path: Path) -> None:
    # Steps of 0.1: 0.04 is nothing in round 1, 0.08 is one step in round 2.
    update = delta(12.7, 0.04, 0.0)
    assert opened(outgoing(tmp_path, 1, update, "int8")) == pytest.approx([12.7, 0.0, 0.0])
    assert opened(outgoing(tmp_path, 2, update, "int8")) == pytest.approx([12.7, 0.1, 0.0])


def test_int4_sends_next_round_what_rounding_took_away(tmp_path: Path) -> None:
    # Steps of 0.1: 0.04 is nothing in round 1, 0.08 is one step in round 2.
    update = delta(0.7, 0.04, 0.0)
    assert opened(outgoing(tmp_path, 1, update, "int4")) == pytest.approx([0.7, 0.0, 0.0])
    assert opened(outgoing(tmp_path, 2, update, "int4")) == pytest.approx([0.7, 0.1, 0.0])


def test_the_same_round_asked_again_gets_the_same_answer(tmp_path: Path) -> None:
    update = delta(12.7, 0.04, -0.03)
    outgoing(tmp_path, 1, update, "int8")
    first = outgoing(tmp_path, 2, update, "int8")
    again = outgoing(tmp_path, 2, update, "int8")
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in again.items()}


def test_only_the_last_two_residuals_are_kept(tmp_path: Path) -> None:
    for round_ in (1, 2, 3, 7):
        outgoing(tmp_path, round_, delta(12.7, 0.04, 0.0), "int8")
    assert residuals(tmp_path) == ["residual_00003.safetensors", "residual_00007.safetensors"]


def test_an_update_that_is_no_number_spoils_no_later_one(tmp_path: Path) -> None:
    outgoing(tmp_path, 1, delta(12.7, 0.04, 0.0), "int8")
    assert not np.isfinite(opened(outgoing(tmp_path, 2, delta(1.0, np.nan, 0.0), "int8"))).all()
    assert opened(outgoing(tmp_path, 3, delta(12.7, 0.04, 0.0), "int8"))[1] == pytest.approx(0.1)
    kept = tensors.load(tmp_path / residuals(tmp_path)[-1])
    assert tensors.all_finite(kept)


def test_float16_keeps_nothing(tmp_path: Path) -> None:
    sent = outgoing(tmp_path, 1, delta(1.0, 1e-8, -3.0), "float16")
    assert opened(sent) == pytest.approx([1.0, 1e-8, -3.0], rel=1e-3)
    assert residuals(tmp_path) == []
