"""Make a network fit for per-record gradients, as differential privacy needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.errors import ConfigError
from medfl.common.models.norms import with_norm

if TYPE_CHECKING:
    from torch import nn


def dp_fit(module: nn.Module) -> nn.Module:
    """Batch norm becomes group norm and no activation works in place; changes `module` itself.

    Per-record gradients need layers in which one record does not touch another and which keep no
    statistics of the data.

    Raises:
        ConfigError: a layer that Opacus's validator refuses all the same.
    """
    from opacus.validators import ModuleValidator

    for layer in module.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]
    module = with_norm(module, "group")
    faults = ModuleValidator.validate(module, strict=False)
    if faults:
        raise ConfigError(
            [
                f"model.name: {fault}. The study trains under differential privacy; use a model of "
                "medfl.common.models.DP_MODELS"
                for fault in faults
            ]
        )
    return module
