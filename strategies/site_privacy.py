"""Differential privacy of whole hospitals: their updates are clipped, and noise is on their sum.

McMahan et al. 2018, "Learning differentially private recurrent language models", Algorithm 1, with
fixed denominator and equal weights. Neighbours differ by one hospital's updates, in all rounds,
being nothing (Kairouz et al. 2021, "Practical and private (deep) learning without sampling or
shuffling", zero-out). Every hospital is asked in every round, so that nothing is claimed for
sampling: T rounds are T Gaussian mechanisms on the same data.

It protects against whoever gets the models, and not against the coordinator, which sees each
update; who took part in which round is no secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from medfl.common import accounting
from medfl.common.errors import ConfigError
from medfl.common.messages import Reply
from medfl.common.study import SiteLevelPrivacy, Study
from medfl.common.tensors import Array, Tensors, floats, l2_norm
from medfl.strategies.strategy import Combine, Combined, Strategy, Weighting, weighted_mean

# (n,) standard normal numbers that nobody can predict.
Normals = Callable[[int], NDArray[np.float64]]


def noise_multiplier(study: Study) -> float:
    """Standard deviation of each round's noise over the clipping bound.

    Raises:
        ConfigError: the study has no [site_privacy].
    """
    privacy = _of(study)
    rounds = study.federation.rounds
    return accounting.noise_multiplier_for(privacy.epsilon, privacy.delta, 1.0, rounds)


def spent(study: Study, rounds: int) -> float:
    """Epsilon of a hospital after so many rounds with a new model, at the study's delta."""
    return accounting.epsilon([(noise_multiplier(study), 1.0, rounds)], _of(study).delta)


def refuse_unfit(study: Study, strategy: Strategy) -> None:
    """Raises ConfigError where more leaves the updates than a sum of bounded parts."""
    local = strategy.local
    if (
        strategy.combine is weighted_mean
        and not local.control_variates
        and local.keeps == "nothing"
    ):
        return
    raise ConfigError(
        f"federation.strategy: {study.federation.strategy} cannot go with [site_privacy], which "
        "needs one sum of clipped updates of the whole model; use fedavg, fedprox, fedavgm, "
        "fedadagrad, fedadam or fedyogi"
    )


def noised_mean(study: Study, normals: Normals) -> Combine:
    """(sum of the updates, each clipped + noise) / sites; the study's weighting is "equal".

    Frozen parameters are left out: they do not move, and noise would move them. No update is no
    change, and says only that nobody answered.
    """
    privacy, frozen = _of(study), study.model.freeze
    sd = noise_multiplier(study) * privacy.clip

    def combine(updates: Iterable[Reply], weight: Weighting) -> Combined:
        sums: dict[str, Array] = {}
        n_sites = 0
        for update in updates:
            moved = {n: a for n, a in floats(update.delta).items() if not n.startswith(frozen)}
            for name, part in shortened(moved, privacy.clip).items():
                if name in sums:
                    sums[name] += part
                else:
                    sums[name] = part
            n_sites += 1
        noised = {
            name: (s + sd * normals(s.size).reshape(s.shape)) / privacy.sites
            for name, s in sorted(sums.items())
        }
        delta = {name: a.astype(np.float32) for name, a in noised.items()}
        return Combined(delta=delta, control={}, n_sites=n_sites)

    return combine


def shortened(delta: Tensors, bound: float) -> dict[str, Array]:
    """In float64, `delta` scaled to L2 norm `bound` where it is longer, all parameters together.

    One that is not finite counts as nothing: it must not escape the bound.
    """
    norm = l2_norm(delta)
    factor = min(1.0, bound / max(norm, 1e-300)) if np.isfinite(norm) else 0.0
    # 0 times infinity is no number.
    return {n: np.nan_to_num(a.astype(np.float64), posinf=0, neginf=0) * factor
            for n, a in delta.items()}  # fmt: skip


def _of(study: Study) -> SiteLevelPrivacy:
    if study.site_privacy is None:
        raise ConfigError("site_privacy: the study has no such table")
    return study.site_privacy
