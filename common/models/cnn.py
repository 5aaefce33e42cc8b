"""The textbook small convolutional network, for 2-D and 3-D images of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.models.entry import Shape, one_of
from medfl.common.models.norms import with_norm

if TYPE_CHECKING:
    from torch import nn


def build(
    shape: Shape,
    *,
    channels: tuple[int, ...] = (32, 64, 128),
    dense: int = 512,
    dropout: float = 0.0,
    norm: str = "none",
) -> nn.Module:
    """(B, C, *spatial) -> (B, outputs): blocks of conv 3, max pool 2, ReLU; then dense layers.

    dense: units of the hidden layer; 0 = none. norm: none, group, instance or batch.
    """
    from torch import nn

    one_of("norm", norm, ("none", "group", "instance", "batch"))
    conv = nn.Conv2d if shape.dimensions == 2 else nn.Conv3d
    pool = nn.MaxPool2d if shape.dimensions == 2 else nn.MaxPool3d
    batch_norm = nn.BatchNorm2d if shape.dimensions == 2 else nn.BatchNorm3d
    layers: list[nn.Module] = []
    width, size = shape.channels, shape.size
    for filters in channels:
        layers.append(conv(width, filters, 3, padding=1))
        if norm != "none":
            layers.append(batch_norm(filters))
        # Pooling before ReLU gives the same numbers for a quarter of the ReLU's work.
        window = tuple(min(2, side) for side in size)
        layers += [pool(window), nn.ReLU()]
        width, size = filters, tuple(side // w for side, w in zip(size, window, strict=True))
    layers += [nn.Flatten(), *_head(Shape(size, width, shape.outputs), dense, dropout)]
    network = nn.Sequential(*layers)
    return network if norm == "none" else with_norm(network, norm)


def _head(shape: Shape, dense: int, dropout: float) -> list[nn.Module]:
    from torch import nn

    if not dense:
        return [nn.Linear(shape.numbers, shape.outputs)]
    hidden: list[nn.Module] = [nn.Linear(shape.numbers, dense), nn.ReLU()]
    if dropout:
        hidden.append(nn.Dropout(dropout))
    return [*hidden, nn.Linear(dense, shape.outputs)]
