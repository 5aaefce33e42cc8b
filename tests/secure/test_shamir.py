"""Shamir's secret sharing."""

from __future__ import annotations

from itertools import combinations

import pytest

from medfl.common.secure.shamir import PRIME, join, new_secret, split, weights_at_zero


def test_shares_are_the_polynomial_worked_by_hand() -> None:
    # 1234 + 166 x + 94 x^2 at 1 ... 6.
    coefficients = iter([166, 94])
    shares = split(1234, 3, 6, draw=lambda: next(coefficients))
    assert shares == [1494, 1942, 2578, 3402, 4414, 5614]


def test_the_secret_comes_back_from_three_shares_by_hand() -> None:
    # At 1, 2, 3 Lagrange's weights are 3, -3, 1: 3 * 1494 - 3 * 1942 + 2578 = 1234.
    assert weights_at_zero([1, 2, 3]) == [3, PRIME - 3, 1]
    assert join(weights_at_zero([1, 2, 3]), [1494, 1942, 2578]) == 1234
    assert join(weights_at_zero([5, 2, 4]), [4414, 1942, 3402]) == 1234


def test_any_threshold_of_the_shares_will_do_and_one_fewer_will_not() -> None:
    secret = PRIME - 1
    shares = split(secret, 3, 5)
    for points in combinations(range(1, 6), 3):
        assert join(weights_at_zero(points), [shares[x - 1] for x in points]) == secret
    for points in combinations(range(1, 6), 2):
        assert join(weights_at_zero(points), [shares[x - 1] for x in points]) != secret


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """Two points of a parabola: for each other secret there is one through them and it."""
    shares = split(1234, 3, 3)
    other = 99
    weights = weights_at_zero([1, 2, 3])
    third = (other - weights[0] * shares[0] - weights[1] * shares[1]) * pow(weights[2], -1, PRIME)
    assert join(weights, [*shares[:2], third % PRIME]) == other


def test_the_field_is_a_field() -> None:
    # Fermat's test to several bases; the prime is that of Curve25519 (RFC 7748, section 4.1).
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11))
    assert 0 <= new_secret() < PRIME


@pytest.mark.parametrize(("secret", "threshold"), [(PRIME, 2), (-1, 2), (5, 0), (5, 4)])
def test_what_cannot_be_shared_is_refused(secret: int, threshold: int) -> None:
    with pytest.raises(ValueError, match="field"):
        split(secret, threshold, 3)


def test_two_shares_of_one_holder_are_no_two_shares() -> None:
    with pytest.raises(ValueError, match="different"):
        weights_at_zero([1, 1, 2])
