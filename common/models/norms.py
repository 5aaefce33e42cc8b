"""Normalisation layers: every convolutional network is built with batch norm, then changed here.

Batch norm mixes the records of a batch and keeps running statistics of one hospital's data, so
it federates badly and cannot be trained with per-record gradients; group and instance norm look
at one record alone (Wu & He 2018; Hsieh et al. 2020).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.models.entry import one_of

if TYPE_CHECKING:
    from torch import nn

NORMS = ("group", "instance", "batch")


def with_norm(module: nn.Module, norm: str) -> nn.Module:
    """Replace every batch norm of a freshly built network by `norm`, in place.

    norm: group, instance or batch (leaves it). Names of weights and biases stay the same.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    one_of("norm", norm, NORMS)
    if norm == "batch":
        return module
    for path, layer in list(module.named_modules()):
        if isinstance(layer, _BatchNorm):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, _replacement(layer, norm))
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer normalises over the batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def groups_for(channels: int) -> int:
    """Largest divisor of `channels` that is at most 32 and leaves 4 channels a group if possible.

    One channel a group would turn a feature map of one voxel into zeros.
    """
    most = max(1, min(32, channels // 4))
    return next(g for g in range(most, 0, -1) if channels % g == 0)


def _replacement(layer: nn.Module, norm: str) -> nn.Module:
    from torch import nn

    channels = int(layer.num_features)  # type: ignore[arg-type]
    if norm == "group":
        return nn.GroupNorm(groups_for(channels), channels)
    kinds = {
        nn.BatchNorm1d: nn.InstanceNorm1d,
        nn.BatchNorm2d: nn.InstanceNorm2d,
        nn.BatchNorm3d: nn.InstanceNorm3d,
    }
    kind = next(instance for batch, instance in kinds.items() if isinstance(layer, batch))
    return kind(channels, affine=True)


def normalisation_names(module: nn.Module) -> list[str]:
    """State names (weights, biases, running statistics) of every normalisation layer."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase

    return [
        f"{path}.{name}"
        for path, layer in module.named_modules()
        if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm)
        for name in layer.state_dict()
    ]
