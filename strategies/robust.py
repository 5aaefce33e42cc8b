"""Rules that stand a few hospitals whose updates are wrong, by accident or on purpose.

They look at all updates of a round side by side, so these are held (`medfl.strategies.held`), and
the next model depends on no single site without bound. Where the federation's weighting is not
mentioned, every site counts once: a case count is a claim, and a claim should not buy a majority.
None of them works under secure aggregation, which hides the single updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import TooFewUpdates
from medfl.common.messages import Reply
from medfl.common.tensors import Tensors, l2_norm
from medfl.strategies.held import Held, Matrix, hold
from medfl.strategies.strategy import Combine, Combined, Weighting, weighted_mean

# (sites, columns) -> (columns,)
ColumnRule = Callable[[NDArray[np.float32]], NDArray[np.float32]]
# What a round's held updates become.
Rule = Callable[[Held, Weighting], Tensors]


def column_median(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median of each column: Yin et al. 2018, Definition 1."""
    rows = sorted_columns(block)
    middle = rows[(len(rows) - 1) // 2 : len(rows) // 2 + 1]
    return np.asarray(middle.mean(axis=0, dtype=np.float64), dtype=np.float32)


def column_trimmed_mean(faulty: int) -> ColumnRule:
    """Mean of each column without its `faulty` smallest and largest: Yin et al. 2018, Def. 2."""

    def rule(block: NDArray[np.float32]) -> NDArray[np.float32]:
        # Sorted, not only partitioned, so that the sum does not depend on the order of the sites.
        kept = sorted_columns(block)[faulty : len(block) - faulty]
        return np.asarray(kept.mean(axis=0, dtype=np.float64), dtype=np.float32)

    return rule


def sorted_columns(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each column in ascending order, by exchanging whole rows: many times faster than column-wise.

    The exchanges are those of Batcher's merge (Knuth, vol. 3, 5.2.2, Algorithm M).
    """
    rows = block.copy()
    smaller = np.empty_like(block[0])
    for upper, lower in _exchanges(len(rows)):
        np.minimum(rows[upper], rows[lower], out=smaller)
        np.maximum(rows[upper], rows[lower], out=rows[lower])
        rows[upper] = smaller
    return rows


def _exchanges(n: int) -> Iterator[tuple[int, int]]:
    """Pairs of positions that sort any n values when the smaller goes to the first."""
    top = 1 << max(0, (n - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(n - d) if i & p == r)
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2


def by_column(rule: ColumnRule) -> Rule:
    """A rule that looks at one number of the model at a time."""

    def combine(held: Held, weight: Weighting) -> Tensors:
        result = np.empty(held.width, dtype=np.float32)
        for where, block in held.blocks():
            result[where] = rule(block)
        return held.as_tensors(result)

    return combine


def nearest(faulty: int, keep: int | None) -> Rule:
    """Mean of the `keep` updates with the lowest Krum score; None: as many as score neighbours.

    Never more than n - faulty: the rest may be the bad ones.
    """

    def combine(held: Held, weight: Weighting) -> Tensors:
        scores = krum_scores(held.squared_distances(), faulty)
        n_kept = min(len(held) - faulty, keep or len(held) - faulty - 2)
        chosen = np.argsort(scores, kind="stable")[:n_kept]
        factors = np.zeros(len(held))
        factors[chosen] = 1.0 / n_kept
        return held.weighted_sum(factors)

    return combine


def krum_scores(squared_distances: Matrix, faulty: int) -> Matrix:
    """Sum of the squared distances to the n - f - 2 nearest others: Blanchard et al. 2017, sec. 4.

    squared_distances: (n, n) with zeros on the diagonal.
    """
    neighbours = len(squared_distances) - faulty - 2
    # Column 0 of the sorted rows is each update's distance to itself, or to its copy.
    return np.asarray(np.sort(squared_distances, axis=1)[:, 1 : neighbours + 1].sum(axis=1))


def geometric(smoothing: float) -> Rule:
    """The point with the smallest weighted sum of distances to the updates."""

    def combine(held: Held, weight: Weighting) -> Tensors:
        alphas = np.array([weight(n) for n in held.n_cases], dtype=np.float64)
        return held.weighted_sum(weiszfeld(held.squared_distances(), alphas, smoothing))

    return combine


def weiszfeld(
    squared_distances: Matrix, alphas: Matrix, smoothing: float, steps: int = 1000
) -> Matrix:
    """Shares (n,), summing to 1, of the points in their geometric median weighted by `alphas`.

    Pillutla et al. 2022, Algorithm 2 (smoothed Weiszfeld): beta_k = alpha_k / max(nu, ||v - w_k||),
    v = sum beta_k w_k / sum beta_k. Because v is always a mean of the points, ||v - w_k|| follows
    from their mutual distances, and no step has to read the updates again.
    """
    shares = alphas / alphas.sum()
    for _ in range(steps):
        to_each = squared_distances @ shares
        from_v = np.sqrt(np.maximum(to_each - 0.5 * (shares @ to_each), 0.0))
        betas = alphas / np.maximum(smoothing, from_v)
        before, shares = shares, betas / betas.sum()
        if np.abs(shares - before).max() < 1e-12:
            break
    return np.asarray(shares)


def clipped_to_the_median(held: Held, weight: Weighting) -> Tensors:
    """Weighted mean of the updates, each shortened to the median norm of the round."""
    weights = np.array([weight(n) for n in held.n_cases], dtype=np.float64)
    norms = np.array(held.norms)
    factors = np.minimum(1.0, np.median(norms) / np.maximum(norms, 1e-30))
    return held.weighted_sum(weights / weights.sum() * factors)


def clip(delta: Tensors, bound: float) -> Tensors:
    """`delta`, shortened to L2 norm `bound` where it is longer: Sun et al. 2019, section 4.2."""
    factor = min(1.0, bound / max(l2_norm(delta), 1e-30))
    return {name: (factor * a).astype(a.dtype) for name, a in delta.items()}


def clipped_to(bound: float) -> Combine:
    """Weighted mean of the updates, each clipped to `bound`; a running sum, nothing is held."""

    def combine(updates: Iterable[Reply], weight: Weighting) -> Combined:
        return weighted_mean((replace(u, delta=clip(u.delta, bound)) for u in updates), weight)

    return combine


def held_together(rule: Rule, fewest: int, name: str) -> Combine:
    """`rule` as a strategy's combine.

    The combine raises TooFewUpdates for fewer updates than `fewest`; no update is no change.
    """

    def combine(updates: Iterable[Reply], weight: Weighting) -> Combined:
        with hold(updates) as held:
            if not len(held):
                return Combined({}, {}, 0)
            if len(held) < fewest:
                raise TooFewUpdates(
                    f"{name} needs {fewest} updates a round and has {len(held)}. Wait for more "
                    "sites, or agree on a strategy that stands fewer faulty ones."
                )
            return Combined(rule(held, weight), {}, len(held))

    return combine
