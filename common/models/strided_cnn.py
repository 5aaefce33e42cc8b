"""A network with few parameters for small grey images under differential privacy.

Noise grows with the square root of the number of parameters, so strides take the place of
convolutions and pooling, and one linear layer the place of a dense head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.models.entry import Shape
from medfl.common.models.norms import groups_for

if TYPE_CHECKING:
    from torch import nn


def build(shape: Shape, *, channels: tuple[int, ...] = (16, 32, 64)) -> nn.Module:
    """(B, C, *spatial) -> (B, outputs): convolutions of stride 2, group norm, ReLU; linear.

    channels: of each convolution, the first 5 wide, then 3; each halves the sides, rounding up.
    """
    from torch import nn

    conv = nn.Conv2d if shape.dimensions == 2 else nn.Conv3d
    layers: list[nn.Module] = []
    before, sides = shape.channels, list(shape.size)
    for number, after in enumerate(channels):
        kernel = 5 if number == 0 else 3
        layers += [
            conv(before, after, kernel, stride=2, padding=kernel // 2),
            nn.GroupNorm(groups_for(after), after),
            nn.ReLU(),
        ]
        before, sides = after, [(s + 1) // 2 for s in sides]
    flat = Shape(tuple(sides), before, shape.outputs).numbers
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, shape.outputs))
