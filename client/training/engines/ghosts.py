"""Layers whose records' gradients are never made: what their norm and their clipped sum need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medfl.client.training.engines.convolution import Geometry
from medfl.client.training.engines.engine import squared_norms

# Between 1 and the next float64.
_EPS = 2.0**-52


@dataclass(frozen=True, slots=True)
class Ghost:
    """A layer whose records' gradients are not made. x: its input, g: its output's gradient.

    geometry: None for a linear layer, whose x is (B, I) and g (B, O). weight, bias: the layer's
    names of those that are trained; "" for one that is not.
    """

    x: Tensor
    g: Tensor
    shape_of: Tensor
    geometry: Geometry | None
    weight: str
    bias: str

    def squared_norms(self, units: Units) -> Tensor:
        """(units,) float64: ‖∂weight‖² + ‖∂bias‖² (Bu et al. 2022, eq. 2.3), never below it.

        Products of different signs cancel, here and again in the clipped sum, which is computed in
        another order and in the model's precision. So the norm comes from float64, and what both
        computations can be wrong by is added to it (Higham 2002, section 3.1): a multiple of the
        norms' sum over the products, as long as nothing cancels some millionths of the norm.
        """
        squares, lengths = (
            self._of_convolution(self.geometry) if self.geometry else self._of_linear(units)
        )
        added_up = self.g.numel() // self.g.shape[1] + 8
        multiplied = self.x[0].numel() + self.g[0].numel() + added_up
        squares = _not_below_zero(squares) + multiplied * _EPS * lengths**2
        return (squares.sqrt() + added_up * torch.finfo(self.g.dtype).eps * lengths) ** 2

    def _of_convolution(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """(units,) squared norms and the sums of norms that cancel in them; units of one record."""
        g = self.g.flatten(2).double()
        of_g = torch.bmm(g.mT, g)
        reads = torch.full_like(of_g, float(bool(self.bias)))
        if self.weight:
            reads += geometry.products(self.x.double(), self.shape_of)
        return (reads * of_g).sum((1, 2)), (_diagonal_root(reads) * _diagonal_root(of_g)).sum(1)

    def _of_linear(self, units: Units) -> tuple[Tensor, Tensor]:
        """As of a convolution. A unit's records are the rows of one map."""
        ours = squared_norms(self.x) if self.weight else torch.zeros((), dtype=torch.float64)
        of_each = (ours + bool(self.bias)) * squared_norms(self.g)
        if units.alone:
            # One product alone, in which nothing cancels.
            return of_each, of_each.sqrt()
        same = units.of_record[:, None] == units.of_record
        x, g = self.x.double(), self.g.double()
        pairs = (g @ g.mT) * ((x @ x.mT if self.weight else 0.0) + bool(self.bias))
        # Not times 0: what is not a number in one unit stays there.
        rows = torch.where(same, pairs, 0).sum(1)
        squares, lengths = (
            t.new_zeros(len(units.sizes)).index_add_(0, units.of_record, t)
            for t in (rows, of_each.sqrt())
        )
        return squares / units.counts(squares) ** 2, lengths / units.counts(lengths)

    def weighted_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """Σ over records of factor · gradient: one weight gradient, of scaled output gradients."""
        keep = factors > 0
        x, g = self.x, self.g * _beside(factors, self.g)
        if not bool(keep.all()):
            # 0 · inf is not a number, so such records become zeros altogether.
            x, g = torch.where(_beside(keep, x), x, 0), torch.where(_beside(keep, g), g, 0)
        found = {}
        if self.weight and self.geometry:
            found[self.weight] = self.geometry.weight_gradient(g, x, self.shape_of)
        elif self.weight:
            found[self.weight] = g.mT @ x
        if self.bias:
            found[self.bias] = g.sum([0, *range(2, g.ndim)])
        return found


@dataclass(frozen=True, slots=True)
class Units:
    """sizes: records of each unit, which stand one unit after another.

    of_record: (records,) which unit a record belongs to.
    """

    sizes: tuple[int, ...]
    of_record: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Units:
        """From the sizes alone."""
        counts = torch.tensor(sizes, device=device)
        numbers = torch.arange(len(sizes), device=device)
        return cls(tuple(sizes), numbers.repeat_interleave(counts))

    @property
    def alone(self) -> bool:
        """Whether every unit has one record."""
        return all(size == 1 for size in self.sizes)

    def counts(self, like: Tensor) -> Tensor:
        """(units,) the sizes, typed and placed as `like`."""
        return torch.tensor(self.sizes, dtype=like.dtype, device=like.device)

    def means(self, gradient: Tensor) -> Tensor:
        """(records, *shape) -> (units, *shape)."""
        summed = gradient.new_zeros(len(self.sizes), *gradient.shape[1:])
        summed.index_add_(0, self.of_record, gradient)
        return summed / _beside(self.counts(gradient), gradient)


@dataclass(slots=True)
class Tape:
    """What one pass leaves beside the gradients."""

    units: Units
    ghosts: list[Ghost] = field(default_factory=list)


def _diagonal_root(squares: Tensor) -> Tensor:
    return _not_below_zero(squares.diagonal(dim1=1, dim2=2)).sqrt()


def _not_below_zero(squares: Tensor) -> Tensor:
    # Rounding may bring a sum that is nearly zero below it; -inf must not become zero.
    return torch.where(squares.isfinite(), squares.clamp_min(0), torch.inf)


def _beside(one_each: Tensor, t: Tensor) -> Tensor:
    return one_each.view(-1, *[1] * (t.ndim - 1))
