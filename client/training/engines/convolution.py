"""Convolutions: each record's gradient of the weights, the norm of it without it, and their sum.

x (B, Ci, *in), g (B, Co, *out) the gradient of the output, weight (Co, Ci / groups, *kernel), or
(Ci, Co / groups, *kernel) where transposed. The rules below come from measurements on two cores
(docs/dp-speed.md) and read shapes alone, so that the same work gives the same bits everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

# Per-record gradients in one grouped convolution: about as many numbers as a core's second cache
# holds, beyond which oneDNN's time per record rises steeply; but some records at least.
GROUPED_NUMBERS, GROUPED_RECORDS = 2**18, 4
# The T x T products of a ghost norm pay where GHOST · T² is at most the number of weights, T the
# voxels of the larger map.
GHOST = 8


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a convolution is besides its weights; tuples have a number a spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, Co, *out)."""
        found: Tensor = torch.ops.aten.convolution(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )
        return found

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Of x, nothing else."""
        return self._backward(g, x, weight, self.groups, (True, False, False))[0]

    def weight_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """(*weight), summed over the records: what a plain step computes."""
        return self._backward(g, x, weight, self.groups, (False, True, False))[1]

    def per_record(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """(B, *weight): the records become groups of one convolution, some at a time."""
        unfolds = self.is_ghostly(x, weight) and set(self.dilation) == {1}
        if unfolds or self.pointwise(weight):
            return torch.bmm(g.flatten(2), self.unfolded(x, weight)).view(len(x), *weight.shape)
        at_once = max(GROUPED_RECORDS, GROUPED_NUMBERS // weight.numel())
        parts = [
            self._grouped(g[i : i + at_once], x[i : i + at_once], weight)
            for i in range(0, len(x), at_once)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def pointwise(self, weight: Tensor) -> bool:
        """Whether it is a matrix product at each voxel."""
        plain = set(self.stride) == {1} and not any(self.padding)
        return plain and prod(weight.shape[2:]) == 1 and self.groups == 1 and not self.transposed

    def is_ghostly(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the map is so small that the norm is cheaper without the gradient."""
        voxels = max(prod(x.shape[2:]), prod(self._out(x, weight)))
        return not self.transposed and self.groups == 1 and GHOST * voxels**2 <= weight.numel()

    def products(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, T, T): of what two output voxels read, for all pairs of the T.

        From the products of single input voxels, shifted by each place of the kernel and added up;
        nothing is unfolded.
        """
        flat = x.flatten(2)
        single = torch.bmm(flat.mT, flat)
        if self.pointwise(weight):
            return single
        out = self._out(x, weight)
        sides = [p for p in reversed(self.padding) for _ in (0, 1)]
        single = functional.pad(single.view(len(x), *x.shape[2:], *x.shape[2:]), 2 * sides)
        total = single.new_zeros(len(x), *out, *out)
        for place in product(*map(range, weight.shape[2:])):
            first = [p * d for p, d in zip(place, self.dilation, strict=True)]
            read = [
                slice(f, f + (n - 1) * s + 1, s)
                for f, n, s in zip(first, out, self.stride, strict=True)
            ]
            total += single[(slice(None), *read, *read)]
        return total.view(len(x), prod(out), prod(out))

    def _out(self, x: Tensor, weight: Tensor) -> list[int]:
        """Sides of the output, where not transposed."""
        sides = zip(
            x.shape[2:], self.padding, self.dilation, weight.shape[2:], self.stride, strict=True
        )
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sides]

    def unfolded(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, T, Ci · kernel): what each of the T output voxels reads; dilation 1, one group."""
        if self.pointwise(weight):
            return x.flatten(2).mT
        dims = len(self.stride)
        padded = functional.pad(x, [p for p in reversed(self.padding) for _ in (0, 1)])
        for d in range(dims):
            padded = padded.unfold(2 + d, weight.shape[2 + d], self.stride[d])
        # (B, Ci, *out, *kernel) -> (B, *out, Ci, *kernel)
        out = range(2, 2 + dims)
        kernel = range(2 + dims, 2 + 2 * dims)
        return padded.permute(0, *out, 1, *kernel).flatten(1 + dims).flatten(1, dims)

    def _grouped(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        n = len(x)
        # Only the shape of the weights counts here: memory that nobody writes to or reads.
        shape = weight.new_empty(n * weight.shape[0], *weight.shape[1:])
        g, x = (t.reshape(1, -1, *t.shape[2:]) for t in (g, x))
        gradient = self._backward(g, x, shape, n * self.groups, (False, True, False))[1]
        return gradient.view(n, *weight.shape)

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            groups,
            wanted,
        )
        return found
