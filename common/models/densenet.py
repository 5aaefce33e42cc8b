"""DenseNet (Huang et al. 2017), MONAI's implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.models.entry import Shape, one_of
from medfl.common.models.norms import with_norm

if TYPE_CHECKING:
    from torch import nn


def build(
    shape: Shape,
    *,
    init_features: int = 64,
    growth_rate: int = 32,
    block_config: tuple[int, ...] = (6, 12, 24, 16),
    bn_size: int = 4,
    dropout: float = 0.0,
    norm: str = "group",
    stem: str = "imagenet",
) -> nn.Module:
    """(B, C, *spatial) -> (B, outputs); the defaults are DenseNet-121.

    stem: imagenet = 7-wide stride-2 convolution and a pool (images of 32 and more a side);
        small = 3-wide stride-1 convolution, no pool.
    """
    from monai.networks.nets.densenet import DenseNet
    from torch import nn

    network = DenseNet(
        spatial_dims=shape.dimensions,
        in_channels=shape.channels,
        out_channels=shape.outputs,
        init_features=init_features,
        growth_rate=growth_rate,
        block_config=block_config,
        bn_size=bn_size,
        dropout_prob=dropout,
        norm="batch",
    )
    if one_of("stem", stem, ("imagenet", "small")) == "small":
        conv = nn.Conv2d if shape.dimensions == 2 else nn.Conv3d
        network.features.conv0 = conv(shape.channels, init_features, 3, padding=1, bias=False)
        network.features.pool0 = nn.Identity()
    return with_norm(network, norm)


def build_121(
    shape: Shape, *, dropout: float = 0.0, norm: str = "group", stem: str = "imagenet"
) -> nn.Module:
    """DenseNet-121."""
    return build(shape, dropout=dropout, norm=norm, stem=stem)
