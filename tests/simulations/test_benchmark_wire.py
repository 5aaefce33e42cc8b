"""What the table of the wire says of a kind follows from its runs."""

from __future__ import annotations

import pytest

from medfl.simulations.benchmarks.wire import Ended, row_of


def ended(auroc: float, sent: float = 10.0, half: float = 0.02) -> Ended:
    return Ended([sent, 2 * sent], 120, auroc, half)


def test_a_row_by_hand() -> None:
    """Losses 0.00 and 0.02: mean 0.01, sd 0.01414, and t(0.975, 1) is 12.706."""
    row = row_of("int4", [ended(0.95), ended(0.92)], [ended(0.95), ended(0.94)], "images")
    assert row.medfl.values == (10.0, 10.0, 20.0, 20.0)
    assert (row.limit, row.ratios) == (15.0, {"float32_raw": 8.0})
    assert row.agree is True
    assert row.notes["lost"] == pytest.approx(0.01)
    assert row.notes["lost_95"] == pytest.approx([0.01 - 0.12706, 0.01 + 0.12706], abs=1e-4)


def test_a_loss_beyond_the_metrics_interval_is_said() -> None:
    assert row_of("int8", [ended(0.9)] * 2, [ended(0.95)] * 2, "images").agree is False
    assert row_of("int8", [ended(0.9)] * 2, [ended(0.95, half=0.06)] * 2, "images").agree is True
    assert row_of("float32", [ended(0.9)] * 2, [ended(0.9)] * 2, "images").limit is None
