"""Arithmetic number by number over whole models, a block at a time.

A formula over arrays of 100 MB makes an array of 100 MB for each of its operations; block by block
it makes them in the cache, with the same bits, and what rests is in memory for a moment only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from medfl.common import resting
from medfl.common.tensors import Array, Tensors

_BLOCK = 2**15

# Flat blocks of the inputs -> one flat block an output.
Rule = Callable[..., Sequence[Array]]


def by_block(rule: Rule, inputs: Sequence[Tensors], outputs: Sequence[Tensors]) -> None:
    """outputs[k][name] = rule(*(i[name] for i in inputs))[k] for each name that all outputs have.

    rule: works number by number. inputs: have each of these names, in the outputs' shapes.
    """
    for name in outputs[0]:
        taken = [tensors[name] for tensors in inputs]
        filled = [tensors[name] for tensors in outputs]
        flat_in, flat_out = ([a.reshape(-1) for a in group] for group in (taken, filled))
        length = filled[0].size
        for begin in range(0, length, resting.WINDOW):
            end = min(begin + resting.WINDOW, length)
            for first in range(begin, end, _BLOCK):
                where = slice(first, min(first + _BLOCK, end))
                blocks = rule(*(a[where] for a in flat_in))
                for target, block in zip(flat_out, blocks, strict=True):
                    target[where] = block
            for array in (*taken, *filled):
                resting.let_go(array, begin, end)
