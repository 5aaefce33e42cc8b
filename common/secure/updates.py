"""An update as the words of a secure sum, and the sum of words as the mean of the updates.

    delta * weight / cap, cut off at range  -> integers  |  control, cut off at control_range
    sum of integers * step * cap / sum of weights        |  sum of integers * step / sites

The parameters lie one after another in order of their names, the control variates' changes behind
them. `cap` is a power of two at or above every weight, so that the product keeps all digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfl.common.secure.rings import RINGS, Ring, Words, encode, signed
from medfl.common.study import Study
from medfl.common.tensors import Array, Tensors, l2_norm

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Scale:
    """How a study's numbers become integers among so many sites.

    limit, control_limit: the largest change of a parameter and of a control variate; 0 = none.
    """

    ring: Ring
    levels: int
    limit: float
    control_limit: float
    weight_cap: int

    def step(self, weight: float) -> float:
        """What one level of a delta is worth, where this is the weight (or the sum of weights)."""
        return self.limit / self.levels * self.weight_cap / weight

    @property
    def control_step(self) -> float:
        """What one level of a control variate's change is worth."""
        return self.control_limit / self.levels


def scale_of(study: Study, sites: int, weight_cap: int) -> Scale:
    """The scale of a study with secure aggregation. Raises ValueError without it."""
    secure = study.secure_aggregation
    if secure is None:
        raise ValueError("the study has no secure aggregation")
    ring = RINGS[study.federation.updates]
    control = secure.control_range or 0.0
    return Scale(ring, ring.levels(sites), secure.range, control, weight_cap)


def cap_of(largest_weight: float) -> int:
    """The least power of two at or above it; it tells no more than a weight's order."""
    return 1 << max(0, math.ceil(math.log2(largest_weight)))


def shortened(delta: Tensors, bound: float | None) -> Tensors:
    """`delta` with an L2 norm of at most `bound` (Sun et al. 2019, section 4.2)."""
    norm = l2_norm(delta)
    if bound is None or norm <= bound:
        return delta
    factor = bound / norm
    return {name: (a * factor).astype(np.float32) for name, a in delta.items()}


def to_words(delta: Tensors, control: Tensors, weight: float, scale: Scale) -> tuple[Words, int]:
    """One site's integers, and how many numbers lay beyond the range. Finite values only."""
    parts = [encode(_flat(delta), 1 / scale.step(weight), _reach(weight, scale), scale.ring)]
    if control:
        parts.append(encode(_flat(control), 1 / scale.control_step, scale.levels, scale.ring))
    return np.concatenate([words for words, _ in parts]), sum(beyond for _, beyond in parts)


def from_words(
    total: Words, shapes: Shapes, control_shapes: Shapes, weights: float, sites: int, scale: Scale
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The means of the deltas and of the control variates' changes, float32.

    weights: the sum of the sites' weights. With one site and its own weight: what it has sent.
    """
    whole = signed(total, scale.ring)
    n = length(shapes)
    delta = _unflat(whole[:n], scale.step(weights), shapes)
    return delta, _unflat(whole[n:], scale.control_step / sites, control_shapes)


def length(shapes: Shapes) -> int:
    """Numbers of these tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def _reach(weight: float, scale: Scale) -> int:
    """The level of a parameter at its range: a light site's is lower by its weight."""
    return math.floor(scale.levels * weight / scale.weight_cap)


def _flat(tensors: Tensors) -> Array:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)] or [np.empty(0)])


def _unflat(whole: NDArray[np.int64], step: float, shapes: Shapes) -> dict[str, Array]:
    arrays, start = {}, 0
    for name in sorted(shapes):
        end = start + math.prod(shapes[name])
        arrays[name] = (whole[start:end] * step).astype(np.float32).reshape(shapes[name])
        start = end
    return arrays
