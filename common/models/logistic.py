"""Logistic regression: one linear layer over the flattened input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.models.entry import Shape

if TYPE_CHECKING:
    from torch import nn


def build(shape: Shape, *, zero_init: bool = True) -> nn.Module:
    """(B, F) or (B, C, *spatial) -> (B, outputs).

    zero_init: start at zero; the problem is convex, so a random start only adds noise.
    """
    from torch import nn

    linear = nn.Linear(shape.numbers, shape.outputs)
    if zero_init:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Flatten(), linear)
