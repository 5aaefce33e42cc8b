"""ResNet (He et al. 2016), MONAI's implementation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from medfl.common.models.entry import Shape, one_of
from medfl.common.models.norms import with_norm

if TYPE_CHECKING:
    from torch import nn


def build(depth: int, shape: Shape, *, norm: str = "group", stem: str = "imagenet") -> nn.Module:
    """(B, C, *spatial) -> (B, outputs).

    stem: imagenet = 7-wide stride-2 convolution and a pool (images of 64 and more a side);
        small = 3-wide stride-1 convolution, no pool.
    """
    from monai.networks.nets import resnet

    small = one_of("stem", stem, ("imagenet", "small")) == "small"
    make: Any = {
        10: resnet.resnet10,
        18: resnet.resnet18,
        34: resnet.resnet34,
        50: resnet.resnet50,
    }[depth]
    network: nn.Module = make(
        spatial_dims=shape.dimensions,
        n_input_channels=shape.channels,
        num_classes=shape.outputs,
        conv1_t_size=3 if small else 7,
        conv1_t_stride=1 if small else 2,
        no_max_pool=small,
        norm="batch",
    )
    return with_norm(network, norm)


build_10 = partial(build, 10)
build_18 = partial(build, 18)
build_34 = partial(build, 34)
build_50 = partial(build, 50)
