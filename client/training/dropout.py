"""Dropout under privacy: each record's own units fall out, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from medfl.client.training.draws import OfEach, OutsideRandomnessError

_WHOLE_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Dropouts:
    """The dropout layers of a model while it trains under privacy.

    place: the one record that the model sees, (1,) as a position in the batch; None: it sees all.
        `torch.func.vmap` shows a model one record at a time.
    """

    def __init__(self, each: OfEach) -> None:
        self._each = each
        self._uses: dict[str, int] = {}
        self.place: Tensor | None = None

    @contextmanager
    def replaced(self, model: nn.Module) -> Iterator[None]:
        """Within it, the layers drop by each record's own numbers.

        Raises:
            OutsideRandomnessError: a layer of another kind, or whatever else drew random numbers.
        """
        layers = {p: m for p, m in model.named_modules() if isinstance(m, _DropoutNd)}
        for path, layer in layers.items():
            if type(layer) not in (nn.Dropout, *_WHOLE_CHANNELS):
                raise OutsideRandomnessError(f"{path} is a {type(layer).__name__}")
        hook = model.register_forward_pre_hook(lambda *_: self._uses.clear())
        before = _states(model)
        try:
            for path, layer in layers.items():
                # An attribute of the instance hides the method of its class until it is deleted.
                layer.forward = self._forward(path, layer)
            yield
        finally:
            hook.remove()
            for layer in layers.values():
                layer.__dict__.pop("forward", None)
        if not all(map(torch.equal, before, _states(model))):
            raise OutsideRandomnessError("draws random numbers outside of its dropout layers")

    def _forward(self, path: str, layer: _DropoutNd) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not layer.training or layer.p == 0:
                return x
            single = len(x) == (1 if self.place is not None else len(self._each.batch))
            if not single:
                raise OutsideRandomnessError(f"{path} sees something else than one row a record")
            used = self._uses[path] = self._uses.get(path, 0) + 1
            whole = isinstance(layer, _WHOLE_CHANNELS)
            shape = (x.shape[1], *[1] * (x.ndim - 2)) if whole else tuple(x.shape[1:])
            kept = self._each.kept(f"{path}\x1f{used}", prod(shape), 1 - layer.p)
            kept = kept.to(x.device).view(-1, *shape)
            if self.place is not None:
                kept = kept.index_select(0, self.place)
            return x * kept.to(x.dtype) / (1 - layer.p) if layer.p < 1 else x * 0

        return forward


def _states(model: nn.Module) -> list[Tensor]:
    """Of the generators that layers draw from if nobody tells them another."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    accelerators = [torch.cuda.get_rng_state(d) for d in sorted(devices, key=str)]
    return [torch.get_rng_state(), *accelerators]
