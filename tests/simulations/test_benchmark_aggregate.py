"""What the strategies are compared with is right, and notices what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from medfl.simulations.benchmarks import aggregate_reference as reference
from medfl.simulations.benchmarks.aggregate import Load, Stream, first


def test_the_reference_rules_by_hand() -> None:
    three = np.array([[0.0, 1.0], [1.0, -1.0], [9.0, -3.0]])
    equal = np.full(3, 1 / 3)
    assert reference.RULES["median"](three, equal).tolist() == [1.0, -1.0]
    assert reference.RULES["trimmed_mean"](three, equal).tolist() == [1.0, -1.0]
    # Norms 1, 1.414, 9.487; the last one is shortened to the second.
    shortened = three[2] * np.sqrt(2) / np.sqrt(90)
    wanted = (three[0] + three[1] + shortened) / 3
    np.testing.assert_allclose(reference.RULES["norm_clipping"](three, equal), wanted)
    five = np.array([[0.0], [1.0], [2.0], [4.0], [50.0]])
    assert reference.RULES["krum"](five, np.full(5, 0.2)).tolist() == [1.0]


def test_a_geometric_median_is_where_the_pulls_cancel() -> None:
    points = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [-1.0, -2.0]])
    share = np.array([0.2, 0.3, 0.3, 0.2])
    towards = points - reference.RULES["geometric_median"](points, share)
    pulls = share[:, None] * towards / np.linalg.norm(towards, axis=1)[:, None]
    assert np.abs(pulls.sum(axis=0)).max() < 1e-5


@pytest.mark.parametrize(("spoilt_by", "agree"), [(0.0, True), (1e-4, False)])
def test_a_mean_that_is_slightly_off_is_noticed(spoilt_by: float, agree: bool) -> None:
    load = Load("fedavg", 5, 0.4)
    weights = first(load)
    updates = [reply.delta["w"].astype(np.float64) for reply in Stream(load, 0, weights)]
    share = np.array([reference.cases(s) for s in range(5)], dtype=np.float64)
    after = (weights + np.tensordot(share / share.sum(), updates, 1)).astype(np.float32)
    after[3, 4] += spoilt_by
    assert reference.agrees("fedavg", 5, [weights], after) is agree
