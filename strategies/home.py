"""Which parts of a model stay at the hospital: both sides ask, so that neither sends nor takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.errors import ConfigError
from medfl.strategies.strategy import Local

if TYPE_CHECKING:
    from torch import nn


_PUBLISHED = {
    "nothing": "",
    "normalisation": "the shared part alone: normalisation layers are as at the start, and each "
    "hospital has its own",
    "everything": "the untrained start alone: each hospital has a model of its own",
}


def published_part(local: Local) -> str:
    """What a published file holds where layers stay at the hospitals; "" for a whole model."""
    return _PUBLISHED[local.keeps]


def home_names(model: nn.Module, local: Local) -> frozenset[str]:
    """Names of the parameters and buffers that never leave a hospital.

    Raises:
        ConfigError: the strategy keeps layers of a kind that the model does not have.
    """
    if local.keeps == "nothing":
        return frozenset()
    if local.keeps == "everything":
        return frozenset(model.state_dict())
    from medfl.common.models.norms import normalisation_names

    names = frozenset(normalisation_names(model))
    if not names:
        raise ConfigError(
            "federation.strategy: it keeps normalisation layers at the hospital, and the model "
            "has none with parameters. Choose another norm in model.options, or another strategy"
        )
    return names
