"""A multilayer perceptron over the flattened input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.models.entry import Shape

if TYPE_CHECKING:
    from torch import nn


def build(shape: Shape, *, hidden: tuple[int, ...] = (64, 32), dropout: float = 0.0) -> nn.Module:
    """(B, F) or (B, C, *spatial) -> (B, outputs); each hidden layer is linear, ReLU, dropout."""
    from torch import nn

    layers: list[nn.Module] = [nn.Flatten()]
    width = shape.numbers
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = units
    return nn.Sequential(*layers, nn.Linear(width, shape.outputs))
