"""The prepare exchange: what all hospitals must share before round 1, from sums only.

A hospital sends counts and sums over its training cases (`LocalStatistics`); the coordinator adds
them up and sends everybody the same `Shared`. No hospital's own mean is ever published.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
    features: moments of each number, by feature. levels: values seen of each category.
    intensity: moments of each image channel's voxels.
    private: this hospital trains under differential privacy, so that everybody's model must be
        one that per-record gradients work with.
    """

    n_cases: int
    class_counts: tuple[float, ...] = ()
    features: Mapping[str, Moments] = field(default_factory=dict)
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    intensity: tuple[Moments, ...] = ()
    private: bool = False


@dataclass(frozen=True, slots=True)
class Shared:
    """What every hospital uses to turn its cases into the same numbers.

    means, sds: by feature, over all hospitals. levels: sorted values of each category.
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
    total = LocalStatistics(n_cases=0)
    for part in parts:
        total = _add(total, part)
    return Shared(
        means={name: m.mean for name, m in sorted(total.features.items())},
        sds={name: m.sd for name, m in sorted(total.features.items())},
        levels={name: tuple(sorted(v)) for name, v in sorted(total.levels.items())},
        channel_means=tuple(m.mean for m in total.intensity),
        channel_sds=tuple(m.sd for m in total.intensity),
        class_counts=total.class_counts,
        private=total.private,
    )


def _add(left: LocalStatistics, right: LocalStatistics) -> LocalStatistics:
    names = {*left.features, *right.features}
    return LocalStatistics(
        n_cases=left.n_cases + right.n_cases,
        class_counts=_zip(left.class_counts, right.class_counts, "classes"),
        features={
            n: left.features.get(n, Moments()) + right.features.get(n, Moments()) for n in names
        },
        levels={
            n: tuple({*left.levels.get(n, ()), *right.levels.get(n, ())})
            for n in {*left.levels, *right.levels}
        },
        intensity=_zip(left.intensity, right.intensity, "image channels"),
        private=left.private or right.private,
    )


def _zip(left: tuple[Any, ...], right: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    if not left or not right:
        return left or right
    if len(left) != len(right):
        raise FederationError(
            f"Two sites have {len(left)} and {len(right)} {what}. Compare their `medfl-client "
            "check` with the study's task and input."
        )
    return tuple(a + b for a, b in zip(left, right, strict=True))


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
        levels={n: tuple(v) for n, v in plain["levels"].items()},
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
