"""Every record's gradient as numbers, by torch.func (vmap over grad): for any model.

It needs no rule for any layer. It is the reference of the other engine and stands in where that
one has no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from medfl.client.training.dropout import Dropouts
from medfl.client.training.engines.engine import Bound, Loss, squared_norms
from medfl.client.training.units import Gradients, mean_by_unit

PerRecord = Callable[[Mapping[str, Tensor], Tensor, Tensor], Gradients]


class Materialised:
    """An engine from any function that gives the gradients of single records."""

    name = "functorch"

    def __init__(self, parameters: Mapping[str, nn.Parameter], gradients_of: PerRecord) -> None:
        self._parameters, self._gradients_of = parameters, gradients_of

    def clipped_sum(
        self, inputs: Tensor, targets: Tensor, sizes: Sequence[int], bound: Bound
    ) -> Gradients:
        """As `Engine.clipped_sum`."""
        gradients = self._gradients_of(self._values(), inputs, targets)
        return clipped_sum(mean_by_unit(gradients, sizes), bound)

    def total(self, inputs: Tensor, targets: Tensor) -> Gradients:
        """As `Engine.total`."""
        gradients = self._gradients_of(self._values(), inputs, targets)
        return {name: gradient.sum(dim=0) for name, gradient in gradients.items()}

    def _values(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._parameters.items()}


def per_record_gradients(
    model: nn.Module, loss_of: Loss, dropouts: Dropouts | None = None
) -> PerRecord:
    """(parameters, inputs (B, ...), targets (B, ...)) -> gradients (B, *shape) by name.

    Each record's loss is taken alone, as a batch of one; frozen parameters are the model's own.
    dropouts: the model's, while they drop by each record's own numbers.
    """

    def loss_of_one(
        parameters: Mapping[str, Tensor], one: Tensor, target: Tensor, place: Tensor
    ) -> Tensor:
        if dropouts is not None:
            dropouts.place = place[None]
        logits = functional_call(model, dict(parameters), (one[None],))
        return loss_of(logits, target[None])

    each = vmap(grad(loss_of_one), in_dims=(None, 0, 0, 0), randomness="different")

    def gradients_of(
        parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> Gradients:
        try:
            places = torch.arange(len(inputs), device=inputs.device)
            found: Gradients = each(parameters, inputs, targets, places)
        finally:
            if dropouts is not None:
                dropouts.place = None
        return found

    return gradients_of


def clipped_sum(gradients: Gradients, bound: Bound) -> Gradients:
    """Σ over units of g · min(1, bound / ‖g‖), the norm over all parameters together.

    A unit whose gradient is not a number counts as zero. Changes `gradients` there.
    """
    squares = torch.stack([squared_norms(g) for g in gradients.values()])
    factors = bound.factors(squares.sum(dim=0).sqrt())
    bad = factors == 0
    if bool(bad.any()):
        for gradient in gradients.values():
            gradient[bad] = 0.0
    return {n: torch.tensordot(factors.to(g.dtype), g, dims=1) for n, g in gradients.items()}
