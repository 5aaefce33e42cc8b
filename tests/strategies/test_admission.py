"""A bad update costs its site the round; what is bad is said in a few words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from medfl.common.messages import Instruction, Reply
from medfl.strategies.admission import MAX_CASES, fault_of

WEIGHTS = {"w": np.zeros((2, 3), dtype=np.float32), "norm": np.zeros(3, dtype=np.float32)}
ASKED = Instruction(kind="round", study_digest="", run="main", weights=WEIGHTS)
GOOD = Reply(site="a", n_cases=5, delta={n: a + 1 for n, a in WEIGHTS.items()})


def with_w(array: Any) -> Reply:
    return replace(GOOD, delta={**GOOD.delta, "w": np.asarray(array)})


def test_a_sound_update_is_admitted() -> None:
    assert fault_of(GOOD, ASKED, WEIGHTS) is None


@pytest.mark.parametrize(
    ("update", "fault"),
    [
        (replace(GOOD, refusal="out of memory"), "out of memory"),
        (replace(GOOD, n_cases=0), "case count out of range"),
        (replace(GOOD, n_cases=-4), "case count out of range"),
        (replace(GOOD, n_cases=MAX_CASES + 1), "case count out of range"),
        (with_w(np.full((2, 3), np.nan, dtype=np.float32)), "value that is not finite"),
        (with_w(np.full((2, 3), -np.inf, dtype=np.float32)), "value that is not finite"),
        (with_w(np.zeros((3, 2), dtype=np.float32)), "parameter of another shape"),
        (with_w(np.float32(0)), "parameter of another shape"),
        (with_w(np.zeros((2, 3), dtype=np.float64)), "parameter of another type"),
        (with_w(np.zeros((2, 3), dtype=np.int32)), "parameter of another type"),
        (replace(GOOD, delta={**GOOD.delta, "x": np.zeros(1)}), "unknown parameter"),
        (replace(GOOD, delta={"w": WEIGHTS["w"]}), "missing parameter"),
        (replace(GOOD, delta={}), "missing parameter"),
        (replace(GOOD, control={"w": WEIGHTS["w"]}), "unknown parameter"),
    ],
)
def test_an_unsound_update_is_named(update: Reply, fault: str) -> None:
    assert fault_of(update, ASKED, WEIGHTS) == fault


def test_one_value_among_many_that_is_no_number_is_found() -> None:
    array = np.zeros((2, 3), dtype=np.float32)
    array[1, 2] = np.nan
    assert fault_of(with_w(array), ASKED, WEIGHTS) == "value that is not finite"


def test_layers_that_stay_at_home_are_not_taken() -> None:
    travels = {"w"}
    assert fault_of(GOOD, ASKED, travels) == "unknown parameter"
    assert fault_of(replace(GOOD, delta={"w": WEIGHTS["w"]}), ASKED, travels) is None


def test_a_control_variate_must_come_where_one_was_sent() -> None:
    asked = replace(ASKED, control=WEIGHTS)
    assert fault_of(GOOD, asked, WEIGHTS) == "missing parameter"
    assert fault_of(replace(GOOD, control=WEIGHTS), asked, WEIGHTS) is None
    bad = {**WEIGHTS, "w": np.full((2, 3), np.inf, dtype=np.float32)}
    assert fault_of(replace(GOOD, control=bad), asked, WEIGHTS) == "value that is not finite"


def test_where_everything_stays_at_home_nothing_may_come() -> None:
    assert fault_of(replace(GOOD, delta={}), ASKED, ()) is None
    assert fault_of(GOOD, ASKED, ()) == "unknown parameter"
