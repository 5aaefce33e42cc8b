"""A network's weights as plain arrays, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from medfl.common.errors import FederationError
from medfl.common.tensors import Array, Tensors

if TYPE_CHECKING:
    from torch import Tensor, nn


def get_weights(module: nn.Module) -> dict[str, Array]:
    """Copies of every parameter and buffer by name; floating ones as float32."""
    weights: dict[str, Array] = {}
    for name, tensor in module.state_dict().items():
        array = tensor.detach().cpu().numpy()
        kind = np.float32 if tensor.is_floating_point() else array.dtype
        weights[name] = array.astype(kind, order="C", copy=True)
    return weights


def set_weights(module: nn.Module, tensors: Tensors) -> None:
    """Copy `tensors` into the network, on whatever device it is.

    Raises:
        FederationError: another set of names, another shape, or floats where integers belong.
    """
    import torch

    own = module.state_dict()
    if own.keys() != tensors.keys():
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise FederationError(
            f"The weights do not fit the model: missing {_few(missing)}, unknown {_few(extra)}. "
            "Both sides must run the same study and medfl version."
        )
    for name, tensor in own.items():
        fault = fit_fault(tensor, tensors[name])
        if fault:
            raise FederationError(
                f"The weights do not fit the model: {name} {fault}. "
                "Both sides must run the same study and medfl version."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            # torch takes no array that must not be written to.
            tensor.copy_(torch.from_numpy(np.require(tensors[name], requirements=["C", "W"])))


def place(module: nn.Module, device: str) -> nn.Module:
    """`module.to(device)`, unless it is there: `to` asks every layer, for as long as a small
    hospital's batch takes."""
    import torch

    first = next(module.parameters(), None)
    return (
        module if first is not None and first.device == torch.device(device) else module.to(device)
    )


def fit_fault(tensor: Tensor, array: Array) -> str | None:
    """Why `array` cannot be copied into `tensor`; None where it can."""
    if tuple(tensor.shape) != array.shape:
        return f"has shape {array.shape}, not {tuple(tensor.shape)}"
    if tensor.is_floating_point() != bool(np.issubdtype(array.dtype, np.floating)):
        return f"has type {array.dtype}, not {tensor.dtype}"
    return None


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
