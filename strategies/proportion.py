"""Updates out of all proportion are left out: far longer than the others, they would be the mean.

An update is compared with the median length of the round *before*: that is known while this
round's updates stream by, one at a time, and neither one site nor a minority decides it. The first
round of a run has none before it; its updates are held on disk until its own median is known.
All well-formed updates of a round count for its median, also those that were left out, so that a
run whose updates all grow is held up for one round and not for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medfl.common.messages import Reply
from medfl.common.tensors import Array, Tensors, l2_norm
from medfl.strategies.held import hold
from medfl.strategies.strategy import ServerState

OUT_OF_PROPORTION = "update out of proportion"

_SLOT = "median_lengths"


@dataclass(frozen=True, slots=True)
class Lengths:
    """L2 norms of an update's delta and of its change of the control variate."""

    delta: float
    control: float


def lengths_of(update: Reply) -> Lengths:
    """Of one update."""
    return Lengths(l2_norm(update.delta), l2_norm(update.control))


def median_of(lengths: Sequence[Lengths]) -> Lengths | None:
    """Field by field; None of none."""
    if not lengths:
        return None
    return Lengths(
        float(np.median([one.delta for one in lengths])),
        float(np.median([one.control for one in lengths])),
    )


def exceeds(own: Lengths, median: Lengths, limit: float) -> bool:
    """Whether a length is more than `limit` medians; a median of 0 says nothing."""
    return own.delta > limit * median.delta > 0 or own.control > limit * median.control > 0


def remembered(state: ServerState) -> Lengths | None:
    """The median lengths of the last round; None before the first."""
    slot = state.slots.get(_SLOT)
    return None if slot is None else Lengths(float(slot["delta"]), float(slot["control"]))


def remember(state: ServerState, median: Lengths | None) -> ServerState:
    """`state` with the median lengths of this round, if it had any."""
    if median is None:
        return state
    slot = {"delta": np.array(median.delta), "control": np.array(median.control)}
    return replace(state, slots={**state.slots, _SLOT: slot})


class Proportion:
    """One round's updates in one pass; afterwards who was left out, and the median for the next.

    earlier: median lengths of the round before, if there was one. limit: in medians.
    """

    def __init__(self, earlier: Lengths | None, limit: float) -> None:
        self._earlier, self._limit = earlier, limit
        self._seen: list[Lengths] = []
        self.left_out: list[str] = []

    @property
    def median(self) -> Lengths | None:
        """Of all updates that came by; the earlier one where none did."""
        return median_of(self._seen) or self._earlier

    def admit(self, updates: Iterable[Reply]) -> Iterator[Reply]:
        """Those that are in proportion, in the same order."""
        if self._earlier is None:
            yield from self._after_all(updates)
            return
        for update in updates:
            self._seen.append(lengths_of(update))
            if self._fits(update, self._seen[-1], self._earlier):
                yield update
            del update  # else it would lie in memory until the next one is there

    def _after_all(self, updates: Iterable[Reply]) -> Iterator[Reply]:
        bare: list[Reply] = []

        def noted() -> Iterator[Reply]:
            for update in updates:
                self._seen.append(lengths_of(update))
                bare.append(replace(update, delta={}, control={}))
                yield replace(update, delta=_as_one(update), control={})
                del update

        with hold(noted()) as held:
            median = median_of(self._seen)
            for row, (update, own) in enumerate(zip(bare, self._seen, strict=True)):
                if median is not None and self._fits(update, own, median):
                    groups = _as_groups(held.row(row))
                    yield replace(update, delta=groups["delta"], control=groups["control"])
                    del groups  # else it would lie in memory until the next one is there

    def _fits(self, update: Reply, own: Lengths, median: Lengths) -> bool:
        if exceeds(own, median, self._limit):
            self.left_out.append(update.site)
            return False
        return True


def _as_one(update: Reply) -> dict[str, Array]:
    groups = {"delta": update.delta, "control": update.control}
    return {f"{group}/{n}": a for group, found in groups.items() for n, a in found.items()}


def _as_groups(row: Tensors) -> Mapping[str, dict[str, Array]]:
    groups: dict[str, dict[str, Array]] = {"delta": {}, "control": {}}
    for name, array in row.items():
        group, _, own = name.partition("/")
        groups[group][own] = array
    return groups
