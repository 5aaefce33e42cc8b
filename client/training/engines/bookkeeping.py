"""Book-keeping (Bu et al. 2023, arXiv 2210.00038): one forward pass, one backward pass.

The pass computes the gradient of the data and, layer by layer, each record's gradient of the
weights; never the batch's, which hooks pay for on top. Where a map is small and its weights are
many, the record's gradient is not made either: its norm follows from the layer's input and output
gradient (ghost norm), and the clipped sum is one weight gradient, as in a plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor, nn

from medfl.client.training.engines.engine import (
    Bound,
    Loss,
    NotCoveredError,
    squared_norms,
)
from medfl.client.training.engines.ghosts import Tape, Units
from medfl.client.training.engines.layers import RULES, Names, fault
from medfl.client.training.units import Gradients

# Numbers of a record's gradient of one parameter that are not worth a call of their own.
SMALL = 2**12


class BookKeeping:
    """The engine of a model for whose every trained layer there is a rule.

    Raises:
        NotCoveredError: it is not such a model; on the first call at the latest.
    """

    name = "book-keeping"

    def __init__(self, model: nn.Module, loss_of: Loss) -> None:
        self._model, self._loss_of = model, loss_of
        self._layers = covered_layers(model)

    def clipped_sum(
        self, inputs: Tensor, targets: Tensor, sizes: Sequence[int], bound: Bound
    ) -> Gradients:
        """As `Engine.clipped_sum`."""
        tape = Tape(Units.of(sizes, inputs.device))
        copies = self._copies(len(inputs))
        with _replaced(self._layers, copies, tape):
            loss = self._loss_of(self._model(inputs), targets) * len(inputs)
        made = self._differentiated(loss, copies)
        del loss
        if not tape.units.alone:
            made = {name: tape.units.means(g) for name, g in made.items()}
        return _clipped(made, tape, self._parameters(), bound)

    def total(self, inputs: Tensor, targets: Tensor) -> Gradients:
        """As `Engine.total`: nothing is clipped, so a plain backward pass does."""
        parameters = self._parameters()
        loss = self._loss_of(self._model(inputs), targets) * len(inputs)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._model.named_parameters() if p.requires_grad}

    def _copies(self, n: int) -> dict[str, Tensor]:
        """(n, *shape) by full name, all n the same memory."""
        return {
            f"{path}.{name}".lstrip("."): p.detach()
            .expand(n, *p.shape)
            .requires_grad_(p.requires_grad)
            for path, layer in self._layers.items()
            for name, p in layer.named_parameters(recurse=False)
        }

    def _differentiated(self, loss: Tensor, copies: Mapping[str, Tensor]) -> Gradients:
        """The records' gradients of all layers that made them.

        The model's own parameters have no part in the loss, unless something besides their layers
        reads them.
        """
        trained = {name: copy for name, copy in copies.items() if copy.requires_grad}
        own = list(self._parameters().values())
        found = torch.autograd.grad(loss, [*trained.values(), *own], allow_unused=True)
        if any(g is not None for g in found[len(trained) :]):
            raise NotCoveredError("a weight is read by something else than its layer")
        made = zip(trained, found[: len(trained)], strict=True)
        return {name: g for name, g in made if g is not None}


def covered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with trained parameters of their own, by path.

    Raises:
        NotCoveredError: one has no rule, or two share a parameter.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for path, layer in model.named_modules():
        own = list(layer.parameters(recurse=False))
        if not any(p.requires_grad for p in own):
            continue
        if reason := fault(layer):
            raise NotCoveredError(f"{path} ({type(layer).__name__}) {reason}")
        if seen & {id(p) for p in own}:
            raise NotCoveredError(f"{path} shares a weight with another layer")
        seen |= {id(p) for p in own}
        found[path] = layer
    return found


@contextmanager
def _replaced(
    layers: Mapping[str, nn.Module], copies: Mapping[str, Tensor], tape: Tape
) -> Iterator[None]:
    """Within it, the layers compute by their rules, each once."""
    try:
        for path, layer in layers.items():
            full = {n: f"{path}.{n}".lstrip(".") for n, _ in layer.named_parameters(recurse=False)}
            own = {n: copies[name] for n, name in full.items()}
            trained = {n: name for n, name in full.items() if own[n].requires_grad}
            names = Names(trained.get("weight", ""), trained.get("bias", ""))
            forward = RULES[type(layer)](layer, own, names, tape)
            # An attribute of the instance hides the method of its class until it is deleted.
            layer.forward = _once(path, forward)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


def _once(path: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Refuses a second call: the norm of a sum of two uses is not that of their norms."""
    calls = count(1)

    def called(x: Tensor) -> Tensor:
        if next(calls) > 1:
            raise NotCoveredError(f"{path} is used twice")
        return forward(x)

    return called


@torch.no_grad()
def _clipped(
    made: Gradients, tape: Tape, parameters: Mapping[str, Tensor], bound: Bound
) -> Gradients:
    """The clipped sum from the gradients that were made and the layers whose were not."""
    summed = {name: torch.zeros_like(p) for name, p in parameters.items()}
    blocks = _in_blocks(made)
    squares = [squared_norms(b) for b in blocks.values()] + [
        g.squared_norms(tape.units) for g in tape.ghosts
    ]
    if not squares:
        return summed
    factors = bound.factors(torch.stack(squares).sum(dim=0).sqrt())
    bad = factors == 0
    any_bad = bool(bad.any())
    for names, block in blocks.items():
        if any_bad:
            block[bad] = 0.0
        total = factors.to(block.dtype) @ block
        parts = torch.split(total, [summed[name].numel() for name in names])
        summed |= {n: p.view(summed[n].shape) for n, p in zip(names, parts, strict=True)}
    of_records = (factors / tape.units.counts(factors))[tape.units.of_record]
    for ghost in tape.ghosts:
        summed |= ghost.weighted_sum(of_records.to(ghost.g.dtype))
    return summed


def _in_blocks(made: Gradients) -> dict[tuple[str, ...], Tensor]:
    """(units, numbers) by the names in it: many small gradients together, large ones alone.

    A normalisation layer's few numbers cost more in calls than in arithmetic.
    """
    blocks: dict[tuple[str, ...], Tensor] = {}
    small = []
    for name, gradient in made.items():
        if gradient[0].numel() <= SMALL:
            small.append(name)
        else:
            blocks[(name,)] = gradient.flatten(1)
    if small:
        blocks[tuple(small)] = torch.cat([made[name].flatten(1) for name in small], dim=1)
    return blocks
