"""SegResNet without the autoencoder branch (Myronenko 2018), MONAI's implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.models.entry import Shape
from medfl.common.models.norms import with_norm

if TYPE_CHECKING:
    from torch import nn


def build(
    shape: Shape,
    *,
    init_filters: int = 16,
    blocks_down: tuple[int, ...] = (1, 2, 2, 4),
    blocks_up: tuple[int, ...] = (1, 1, 1),
    norm: str = "group",
    dropout: float = 0.0,
) -> nn.Module:
    """(B, C, *spatial) -> (B, outputs, *spatial); sizes divisible by 2^(len(blocks_down) - 1)."""
    from monai.networks.nets.segresnet import SegResNet

    network = SegResNet(
        spatial_dims=shape.dimensions,
        init_filters=init_filters,
        in_channels=shape.channels,
        out_channels=shape.outputs,
        blocks_down=blocks_down,
        blocks_up=blocks_up,
        dropout_prob=dropout or None,
        norm="batch",
    )
    return with_norm(network, norm)
