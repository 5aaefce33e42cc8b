"""Attention U-Net (Oktay et al. 2018), MONAI's implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.models.entry import Shape
from medfl.common.models.norms import with_norm

if TYPE_CHECKING:
    from torch import nn


def build(
    shape: Shape,
    *,
    channels: tuple[int, ...] = (16, 32, 64, 128),
    strides: tuple[int, ...] = (),
    norm: str = "instance",
    dropout: float = 0.0,
) -> nn.Module:
    """(B, C, *spatial) -> (B, outputs, *spatial); sizes must be divisible by all strides' product.

    strides: one fewer than channels; omitted, 2 each.
    """
    from monai.networks.nets.attentionunet import AttentionUnet

    network = AttentionUnet(
        spatial_dims=shape.dimensions,
        in_channels=shape.channels,
        out_channels=shape.outputs,
        channels=channels,
        strides=strides or (2,) * (len(channels) - 1),
        dropout=dropout,
    )
    return with_norm(network, norm)
