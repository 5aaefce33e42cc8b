"""The prepare exchange: what all hospitals must share before round 1, from sums only.

A hospital sends counts and sums over its training cases (`LocalStatistics`); the coordinator adds
them up and sends everybody the same `Shared`. No hospital's own mean is ever published.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from medfl.common.errors import FederationError


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, sum and sum of squares of one number; adding two is adding the fields."""

    n: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """Mean; 0 where nothing was counted."""
        return self.total / self.n if self.n else 0.0

    @property
    def sd(self) -> float:
        """Standard deviation with n - 1 (as pandas and FLamby); 1 where it would be 0."""
        if self.n < 2:
            return 1.0
        variance = (self.squares - self.total**2 / self.n) / (self.n - 1)
        return math.sqrt(variance) if variance > 1e-24 else 1.0


@dataclass(frozen=True, slots=True)
class LocalStatistics:
    """What one hospital adds to the prepare exchange, from its training cases alone.

    n_cases: training cases. class_counts: cases a class (segmentation: voxels a class).
    features: moments of each number, by feature. levels: records a value of each category.
    intensity: moments of each image channel's voxels.
    private: this hospital trains under differential privacy, so that everybody's model must be
        one that per-record gradients work with.
    """

    n_cases: int
    class_counts: tuple[float, ...] = ()
    features: Mapping[str, Moments] = field(default_factory=dict)
    levels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    intensity: tuple[Moments, ...] = ()
    private: bool = False


@dataclass(frozen=True, slots=True)
class Shared:
    """What every hospital uses to turn its cases into the same numbers.

    means, sds: over all hospitals, by feature and by `feature=level` (of the 0/1 column).
    levels: sorted values of each category.
    channel_means, channel_sds: of the images, over all hospitals.
    class_counts: over all hospitals; empty where class weights are not shared.
    private: at least one hospital trains under differential privacy.
    """

    means: Mapping[str, float] = field(default_factory=dict)
    sds: Mapping[str, float] = field(default_factory=dict)
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    channel_means: tuple[float, ...] = ()
    channel_sds: tuple[float, ...] = ()
    class_counts: tuple[float, ...] = ()
    private: bool = False


def merge(parts: Iterable[LocalStatistics]) -> Shared:
    """Add the hospitals' sums and derive what they share; the order of hospitals is irrelevant.

    Raises:
        FederationError: two hospitals count different classes or channels.
    """
    parts = list(parts)
    levels = _levels(parts)
    moments = {
        **{
            name: _sum([p.features[name] for p in parts if name in p.features])
            for name in sorted({name for p in parts for name in p.features})
        },
        **{f"{name}={v}": m for name, found in levels.items() for v, m in found.items()},
    }
    channels = [_sum(c) for c in _columns([p.intensity for p in parts], "image channels")]
    return Shared(
        means={name: m.mean for name, m in moments.items()},
        sds={name: m.sd for name, m in moments.items()},
        levels={name: tuple(found) for name, found in levels.items()},
        channel_means=tuple(m.mean for m in channels),
        channel_sds=tuple(m.sd for m in channels),
        class_counts=tuple(
            math.fsum(c) for c in _columns([p.class_counts for p in parts], "classes")
        ),
        private=any(p.private for p in parts),
    )


def _levels(parts: Sequence[LocalStatistics]) -> dict[str, dict[str, Moments]]:
    """Moments of each level's 0/1 column, by category and level, both sorted."""
    levels = {}
    for name in sorted({name for p in parts for name in p.levels}):
        counts: Counter[str] = Counter()
        for part in parts:
            counts.update(part.levels.get(name, {}))
        levels[name] = {v: Moments(counts.total(), n, n) for v, n in sorted(counts.items())}
    return levels


def _sum(moments: Iterable[Moments]) -> Moments:
    """All of them added; `fsum` rounds once, so that no order gives another last bit."""
    n, total, squares = zip(*((m.n, m.total, m.squares) for m in moments), strict=True)
    return Moments(math.fsum(n), math.fsum(total), math.fsum(squares))


def _columns(rows: Iterable[tuple[Any, ...]], what: str) -> list[tuple[Any, ...]]:
    """The rows turned to columns; hospitals that sent none have no say. Raises FederationError."""
    rows = [row for row in rows if row]
    if len(lengths := sorted({len(row) for row in rows})) > 1:
        raise FederationError(
            f"Sites have {' and '.join(map(str, lengths))} {what}. Compare their `medfl-client "
            "check` with the study's task and input."
        )
    return list(zip(*rows, strict=True))


def statistics_to_plain(value: LocalStatistics | Shared) -> dict[str, Any]:
    """As plain JSON types, for the wire."""
    return asdict(value)


def local_from_plain(plain: Mapping[str, Any]) -> LocalStatistics:
    """Inverse of `statistics_to_plain` for a hospital's part; unknown keys raise TypeError."""
    local = LocalStatistics(**plain)
    return replace(
        local,
        class_counts=tuple(local.class_counts),
        features={n: Moments(**m) for n, m in plain["features"].items()},
        levels={n: dict(v) for n, v in plain["levels"].items()},
        intensity=tuple(Moments(**m) for m in plain["intensity"]),
    )


def shared_from_plain(plain: Mapping[str, Any]) -> Shared:
    """Inverse of `statistics_to_plain` for what is shared; unknown keys raise TypeError."""
    shared = Shared(**plain)
    return replace(
        shared,
        levels={n: tuple(v) for n, v in plain["levels"].items()},
        channel_means=tuple(shared.channel_means),
        channel_sds=tuple(shared.channel_sds),
        class_counts=tuple(shared.class_counts),
    )
