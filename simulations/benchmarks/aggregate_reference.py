"""What strategies must come to, in float64 and over all updates at once: no blocks, no files.

Rules that look at each number by itself are compared on the model's first rows, which need the
updates' first rows only; rules that measure whole updates get all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float32]
Matrix = NDArray[np.float64]

# Rows of the model that are compared where a rule looks at each number by itself.
ROWS = 200


def cases(site: int) -> int:
    """Training cases of a hospital."""
    return 64 + 8 * site


def update(weights: Numbers, site: int, round_: int) -> Numbers:
    """A hospital's update: each has another direction; signs differ; the first one's is far longer.

    A row of it depends on the same row of the weights only.
    """
    factor = (0.5 if site == 0 else 0.01) * (1 + (site + round_) % 5 / 7) * (-1) ** site
    made = np.roll(weights, 7 * site + 1, axis=1)
    made *= np.float32(factor)
    return made


def rows_of(strategy: str) -> slice:
    """What `agrees` wants to see of the weights."""
    return slice(None) if strategy in _WHOLE else slice(0, ROWS)


def agrees(strategy: str, updates: int, history: Sequence[Numbers], after: Numbers) -> bool:
    """Whether these are the weights, to float32's rounding.

    history: `rows_of` the weights that each round started from. after: of those of the end.
    """
    share = np.array([cases(site) for site in range(updates)], dtype=np.float64)
    means = []
    for round_, weights in enumerate(history):
        all_ = np.stack([update(weights, s, round_).ravel() for s in range(updates)])
        rule = RULES.get(strategy, _mean)
        means.append(rule(all_.astype(np.float64), share / share.sum()))
    change = (_adam(means) if strategy == "fedadam" else means[-1]).reshape(after.shape)
    wrong = np.abs(after - (history[-1] + change)).max()
    rounding = 2.0**-22 * np.abs(after).max() + 1e-5 * np.abs(change).max()
    return bool(wrong <= rounding)


def _mean(updates: Matrix, share: Matrix) -> Matrix:
    return share @ updates


def _adam(deltas: Sequence[Matrix]) -> Matrix:
    """Reddi et al. 2021, Algorithm 2, with the catalogue's constants and Flower's correction."""
    m = v = np.zeros_like(deltas[0])
    for delta in deltas:
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
    t = len(deltas) + 1
    rate = 0.1 * np.sqrt(1 - 0.99**t) / (1 - 0.9**t)
    return np.asarray(rate * m / (np.sqrt(v) + 1e-3))


def _median(updates: Matrix, share: Matrix) -> Matrix:
    return np.asarray(np.median(updates, axis=0))


def _trimmed(updates: Matrix, share: Matrix) -> Matrix:
    return np.asarray(np.sort(updates, axis=0)[1:-1].mean(axis=0))


def _krum(keep: int | None) -> Callable[[Matrix, Matrix], Matrix]:
    def rule(updates: Matrix, share: Matrix) -> Matrix:
        near = len(updates) - 3
        apart = np.array([[np.sum((a - b) ** 2) for b in updates] for a in updates])
        scores = np.sort(apart, axis=1)[:, 1 : near + 1].sum(axis=1)
        chosen = np.argsort(scores, kind="stable")[: keep or near]
        return np.asarray(updates[chosen].mean(axis=0))

    return rule


def _geometric(updates: Matrix, share: Matrix) -> Matrix:
    """Weiszfeld's iteration on the points themselves."""
    point = share @ updates
    for _ in range(60):
        pull = share / np.linalg.norm(updates - point, axis=1)
        point = pull @ updates / pull.sum()
    return np.asarray(point)


def _clipped(updates: Matrix, share: Matrix) -> Matrix:
    norms = np.linalg.norm(updates, axis=1)
    return np.asarray((share * np.minimum(1.0, np.median(norms) / norms)) @ updates)


_WHOLE: Mapping[str, Callable[[Matrix, Matrix], Matrix]] = {
    "krum": _krum(1),
    "multi_krum": _krum(None),
    "geometric_median": _geometric,
    "norm_clipping": _clipped,
}
RULES = {"median": _median, "trimmed_mean": _trimmed, **_WHOLE}
