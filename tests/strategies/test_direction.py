"""Length and direction of updates, from a sketch of each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.strategies.direction import GROUPS, Directions, sketch

KEY = b"k" * 32


def test_cosines_are_to_the_mean_direction_of_the_others() -> None:
    """(1, 0), (0, 2) and (-3, 0): the third is long and still one voice."""
    seen = Directions(KEY)
    for site, numbers in (("a", [1.0, 0.0]), ("b", [0.0, 2.0]), ("c", [-3.0, 0.0])):
        seen.note(site, {"w": np.array(numbers, np.float32)})
    found = seen.found()
    assert {site: one.length for site, one in found.items()} == {"a": 1.0, "b": 2.0, "c": 3.0}
    # a: (1, 0) . (-1, 1) / sqrt(2); b: (0, 1) . (0, 0): the others cancel; c: (-1, 0) . (1, 1).
    assert found["a"].cosine == pytest.approx(-(0.5**0.5))
    assert found["b"].cosine is None
    assert found["c"].cosine == pytest.approx(-(0.5**0.5))


def test_one_update_and_one_that_says_nothing_have_no_direction() -> None:
    seen = Directions()
    seen.note("a", {"w": np.ones(3, np.float32)})
    seen.note("b", {"w": np.zeros(3, np.float32)})
    found = seen.found()
    assert (found["a"].cosine, found["b"].cosine) == (None, None)
    assert found["b"].length == 0


@given(st.floats(-0.9, 0.9), st.integers(0, 1000))
def test_a_large_updates_cosine_is_that_of_its_sketch(cosine: float, seed: int) -> None:
    """Arrays that are longer than a row, in several pieces, with a rest; error about .016."""
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(2, 150_000)).astype(np.float32)
    other = np.float32(cosine) * one + np.float32((1 - cosine**2) ** 0.5) * other
    pieces = [{"a": v[:140_000].reshape(14, -1), "b": v[140_000:]} for v in (one, other)]
    left, right = (sketch(piece, seed) for piece in pieces)
    assert left.shape == (GROUPS,)
    exact = float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other))
    found = float(left @ right) / float(np.linalg.norm(left) * np.linalg.norm(right))
    assert found == pytest.approx(exact, abs=0.09)


def test_signs_that_nobody_knows_are_other_ones_each_round() -> None:
    update = {"w": np.arange(1.0, 9.0, dtype=np.float32)}
    drawn = {tuple(sketch(update, Directions()._seed)[:8]) for _ in range(20)}
    assert len(drawn) > 10
    assert Directions(KEY)._seed == Directions(KEY)._seed
