"""Hospitals whose numbers are unlike the others': another unit, a field of zeros, another scanner.

Compared are the sums of the prepare exchange, which the coordinator has in any case. What is said
is a field's name and what is odd about it, and no number: nothing here tells how many patients a
hospital has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from operator import add

from medfl.common.statistics import LocalStatistics, Moments, Shared

# A mean is far where it lies more than so many standard deviations from the others': of the smaller
# of the two, because a field in another unit has another spread as well. The hospitals of the UCI
# heart study lie within 1.4, but for one whose cholesterol is zero in every record.
FAR_SD = 3.0
# A spread is another where one is more than so many times the other.
SPREAD_TIMES = 5.0

ONE_VALUE = "the same value in every case"
FAR_MEAN = "a mean far from the other hospitals'; in the same unit?"
OTHER_SPREAD = "a spread far from the other hospitals'; in the same unit?"


def unlike(parts: Mapping[str, LocalStatistics]) -> dict[str, tuple[str, ...]]:
    """By hospital, what is far from all others together, as `field: what`; the like are left out.

    parts: of each hospital, by its name.
    """
    found = {site: _unlike_others(site, parts) for site in sorted(parts)}
    return {site: said for site, said in found.items() if said}


def unlike_all(own: LocalStatistics, shared: Shared) -> tuple[str, ...]:
    """The same as one hospital sees it, from its own sums and what all hospitals share.

    The mean over all has its own in it and lies nearer than the others': of two hospitals half as
    far. What is small escapes here and is seen by the coordinator.
    """
    said = []
    for name, moments in own.features.items():
        if name in shared.means:
            every = (shared.means[name], shared.sds[name])
            said.append((name, _odd(moments, *every)))
    for number, moments in enumerate(own.intensity):
        if number < len(shared.channel_means):
            every = (shared.channel_means[number], shared.channel_sds[number])
            said.append((_channel(number), _odd(moments, *every)))
    return tuple(f"{name}: {what}" for name, what in said if what)


def _unlike_others(site: str, parts: Mapping[str, LocalStatistics]) -> tuple[str, ...]:
    others = [_fields(part) for name, part in parts.items() if name != site]
    said = []
    for field, own in _fields(parts[site]).items():
        rest = reduce(add, (fields[field] for fields in others if field in fields), Moments())
        if rest.n >= 2 and (what := _odd(own, rest.mean, rest.sd)):
            said.append(f"{field}: {what}")
    return tuple(said)


def _fields(part: LocalStatistics) -> dict[str, Moments]:
    channels = {_channel(number): moments for number, moments in enumerate(part.intensity)}
    return {**part.features, **channels}


def _channel(number: int) -> str:
    return f"image channel {number + 1}"


def _odd(own: Moments, mean: float, sd: float) -> str:
    """What is odd about a hospital's numbers beside a mean and standard deviation; "" for nothing.

    `Moments.sd` is 1 where all values are the same, so that is told by the sums.
    """
    if own.n < 2:
        return ""
    if own.squares - own.total**2 / own.n <= 1e-12 * own.squares:
        same_everywhere = sd == 1.0 and math.isclose(own.mean, mean)
        return "" if same_everywhere else ONE_VALUE
    if abs(own.mean - mean) > FAR_SD * min(own.sd, sd):
        return FAR_MEAN
    if not 1 / SPREAD_TIMES <= own.sd / sd <= SPREAD_TIMES:
        return OTHER_SPREAD
    return ""
