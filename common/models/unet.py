"""U-Net with optional residual units (Kerfoot et al. 2018), MONAI's UNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.errors import ConfigError
from medfl.common.models.entry import Shape
from medfl.common.models.norms import with_norm

if TYPE_CHECKING:
    from torch import nn


def build(
    shape: Shape,
    *,
    channels: tuple[int, ...] = (16, 32, 64, 128),
    strides: tuple[int, ...] = (),
    res_units: int = 2,
    norm: str = "instance",
    dropout: float = 0.0,
) -> nn.Module:
    """(B, C, *spatial) -> (B, outputs, *spatial); sizes must be divisible by all strides' product.

    strides: one fewer than channels; omitted, 2 each. res_units: 0 = a plain U-Net.
    """
    from monai.networks.nets.unet import UNet

    if len(channels) < 2:
        raise ConfigError("model.options.channels: write at least two numbers, one a level")
    steps = strides or (2,) * (len(channels) - 1)
    if len(steps) != len(channels) - 1:
        raise ConfigError(
            f"model.options.strides: has {len(steps)} numbers for {len(channels)} channels; "
            f"write {len(channels) - 1}"
        )
    network = UNet(
        spatial_dims=shape.dimensions,
        in_channels=shape.channels,
        out_channels=shape.outputs,
        channels=channels,
        strides=steps,
        num_res_units=res_units,
        norm="batch",
        dropout=dropout,
    )
    return with_norm(network, norm)
