"""One rule a kind of layer: the same output, from a copy of the weights for every record.

The copies are views of one set of numbers, so they cost nothing; the gradient with respect to
them is each record's own. Normalisation and PReLU fold the records into channels, and torch's own
backward pass then sums within a record instead of over the batch, for the same price. Linear
layers, convolutions and embeddings compute theirs in a backward pass of their own, or leave only
what its norm and the clipped sum need (`Ghost`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from medfl.client.training.engines.convolution import GHOST, Geometry
from medfl.client.training.engines.ghosts import Ghost, Tape

Copies = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Names:
    """The full names of a layer's weight and bias, "" where it is frozen or not there."""

    weight: str
    bias: str


Rule = Callable[[Any, Copies, Names, Tape], Callable[[Tensor], Tensor]]


class _Linear(Function):
    """x (B, *, I) -> (B, *, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, about: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.about = about
        return functional.linear(x, weight[0], None if bias is None else bias[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (names, tape) = ctx.saved_tensors, ctx.about
        for_x = g @ weight[0] if ctx.needs_input_grad[0] else None
        if x.ndim == 2 and weight[0].numel() >= GHOST:
            tape.ghosts.append(Ghost(x.detach(), g, weight[0], None, names.weight, names.bias))
            return for_x, None, None, None
        rows = g.reshape(len(g), -1, g.shape[-1])
        for_weight = for_bias = None
        if ctx.needs_input_grad[1]:
            for_weight = torch.bmm(rows.mT, x.reshape(len(x), -1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(1)
        return for_x, for_weight, for_bias, None


class _Convolution(Function):
    """x (B, Ci, *in) -> (B, Co, *out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, about: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.about = about
        geometry: Geometry = about[0]
        return geometry.forward(x, weight[0], None if bias is None else bias[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (geometry, names, tape) = ctx.saved_tensors, ctx.about
        one = weight[0]
        for_x = geometry.input_gradient(g, x, one) if ctx.needs_input_grad[0] else None
        if tape.units.alone and geometry.is_ghostly(x, one):
            tape.ghosts.append(Ghost(x.detach(), g, one, geometry, names.weight, names.bias))
            return for_x, None, None, None
        for_weight = geometry.per_record(g, x, one) if ctx.needs_input_grad[1] else None
        for_bias = g.flatten(2).sum(2) if ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias, None


class _Embedding(Function):
    """x (B, *) int64 -> (B, *, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape, ctx.padding = weight.shape, padding
        return functional.embedding(x, weight[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (n, words, width) = ctx.saved_tensors, ctx.shape
        g = g.masked_fill((x == ctx.padding)[..., None], 0)
        of_record = torch.arange(n, device=x.device).view(-1, *[1] * (x.ndim - 1)) * words
        found = g.new_zeros(n * words, width)
        found.index_add_(0, (x + of_record).flatten(), g.reshape(-1, width))
        return None, found.view(n, words, width), None


def _linear(layer: nn.Linear, copies: Copies, names: Names, tape: Tape) -> Any:
    weight, bias = copies["weight"], copies.get("bias")
    return lambda x: _apply(_Linear, x, weight, bias, (names, tape))


def _convolution(layer: Any, copies: Copies, names: Names, tape: Tape) -> Any:
    geometry = Geometry(
        tuple(layer.stride),
        tuple(layer.padding),
        tuple(layer.dilation),
        bool(layer.transposed),
        tuple(layer.output_padding),
        int(layer.groups),
    )
    weight, bias = copies["weight"], copies.get("bias")
    return lambda x: _apply(_Convolution, x, weight, bias, (geometry, names, tape))


def _embedding(layer: nn.Embedding, copies: Copies, names: Names, tape: Tape) -> Any:
    padding = -1 if layer.padding_idx is None else layer.padding_idx
    return lambda x: _apply(_Embedding, x, copies["weight"], padding)


def _group_norm(layer: nn.GroupNorm, copies: Copies, names: Names, tape: Tape) -> Any:
    def forward(x: Tensor) -> Tensor:
        found = functional.group_norm(
            _folded(x), len(x) * layer.num_groups, *_flat(copies), layer.eps
        )
        return _unfolded(found, x)

    return forward


def _instance_norm(layer: Any, copies: Copies, names: Names, tape: Tape) -> Any:
    def forward(x: Tensor) -> Tensor:
        # Statistics "of the batch", which is one record whose channels are everybody's.
        found = functional.batch_norm(
            _folded(x), None, None, *_flat(copies), training=True, momentum=0.0, eps=layer.eps
        )
        return _unfolded(found, x)

    return forward


def _layer_norm(layer: nn.LayerNorm, copies: Copies, names: Names, tape: Tape) -> Any:
    shape = list(layer.normalized_shape)

    def forward(x: Tensor) -> Tensor:
        found = functional.layer_norm(x, shape, None, None, layer.eps)
        between = [1] * (x.ndim - 1 - len(shape))
        found = found * copies["weight"].view(len(x), *between, *shape)
        if "bias" in copies:
            found = found + copies["bias"].view(len(x), *between, *shape)
        return found

    return forward


def _prelu(layer: nn.PReLU, copies: Copies, names: Names, tape: Tape) -> Any:
    def forward(x: Tensor) -> Tensor:
        slopes = copies["weight"].reshape(-1)
        return functional.prelu(x.reshape(1, len(slopes), -1), slopes).view(x.shape)

    return forward


def _apply(function: type[Function], *arguments: Any) -> Tensor:
    found: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


def _unfolded(t: Tensor, x: Tensor) -> Tensor:
    # Not a view, which would have to be copied where a residual block adds to it in place.
    found: Tensor = torch.ops.aten._unsafe_view(t, x.shape)
    return found


def _folded(x: Tensor) -> Tensor:
    return x.reshape(1, -1, *x.shape[2:])


def _flat(copies: Copies) -> tuple[Tensor, Tensor | None]:
    bias = copies.get("bias")
    return copies["weight"].reshape(-1), None if bias is None else bias.reshape(-1)


_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_INSTANCE_NORMS: tuple[type[nn.Module], ...] = (
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)

# Of exactly these classes: a class derived from one may compute something else.
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.PReLU: _prelu,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_INSTANCE_NORMS, _instance_norm),
}


def fault(layer: nn.Module) -> str | None:
    """Why no rule covers this layer; None where one does."""
    if type(layer) not in RULES:
        return "has no rule"
    if not set(dict(layer.named_parameters(recurse=False))) <= {"weight", "bias"}:
        return "has other parameters than weight and bias"
    if isinstance(layer, _CONVOLUTIONS) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return "pads by something else than a number of zeros"
    if isinstance(layer, _INSTANCE_NORMS) and layer.track_running_stats:
        return "keeps statistics"
    if isinstance(layer, nn.Embedding) and (
        layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
    ):
        return "changes or counts its weights"
    return None
