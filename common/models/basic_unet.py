"""The plain U-Net of Falk et al. 2019, MONAI's BasicUNet."""

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
    channels: tuple[int, ...] = (32, 32, 64, 128, 256, 32),
    norm: str = "instance",
    dropout: float = 0.0,
) -> nn.Module:
    """(B, C, *spatial) -> (B, outputs, *spatial); at least 32 voxels a side.

    channels: five levels from the top down, then the last layer before the output.
    """
    from monai.networks.nets.basic_unet import BasicUNet

    if len(channels) != 6:
        raise ConfigError(
            f"model.options.channels: has {len(channels)} numbers; basic_unet takes 6: five "
            "levels and the last layer"
        )
    network = BasicUNet(
        spatial_dims=shape.dimensions,
        in_channels=shape.channels,
        out_channels=shape.outputs,
        features=channels,
        norm="batch",
        dropout=dropout,
    )
    return with_norm(network, norm)
