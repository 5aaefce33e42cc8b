"""What privacy a hospital's training spends: how much noise, and what it has spent so far."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from medfl.client.training.plan import DpPlan
from medfl.common import accounting, tensors
from medfl.common.errors import BudgetSpent, PolicyRefused, StorageError
from medfl.common.site import SitePrivacy
from medfl.common.study import Study

# (noise multiplier, sampling rate, steps) of each round that was begun.
History = tuple[tuple[float, float, int], ...]


def privacy_of(study: Study, site: SitePrivacy | None) -> SitePrivacy | None:
    """The stricter of what the study and the hospital ask for; None where neither asks."""
    asked = study.privacy
    if asked is None:
        return site
    if site is None:
        return SitePrivacy(epsilon=asked.epsilon, delta=asked.delta, clip=asked.clip)
    return SitePrivacy(
        epsilon=min(asked.epsilon, site.epsilon),
        delta=min(asked.delta, site.delta),
        clip=asked.clip,
    )


def refuse_unprotected(study: Study) -> None:
    """A private hospital lets nothing out of its records that no noise protects.

    Raises:
        PolicyRefused: with the keys of the study that read records outside of the training.
    """
    if keys := list(_unprotected(study)):
        raise PolicyRefused(
            "This site trains under differential privacy, and the study computes something from "
            f"its records without noise: {'; '.join(keys)}"
        )


def _unprotected(study: Study) -> Iterator[str]:
    if study.record is not None:
        if study.record.scale in ("federated", "site"):
            yield 'record.scale (write "range", with a range for each number)'
        if any(f.kind == "category" and f.levels is None for f in study.record.features):
            yield "record.features (write the levels of each category)"
    if study.image is not None and study.image.intensity == "federated":
        yield 'image.intensity (write "zscore", "percentiles" or "range")'
    if study.training.loss == "weighted_cross_entropy" and study.training.class_weights is None:
        yield "training.class_weights (write them)"


def dp_plan(study: Study, privacy: SitePrivacy, n_cases: int) -> tuple[DpPlan, int]:
    """The plan of every round and its number of steps, such that all rounds keep the budget."""
    from medfl.client.training.schedule import private_steps_in_round, sample_rate_for

    rate = sample_rate_for(study, n_cases)
    steps = private_steps_in_round(study, rate)
    noise = accounting.noise_multiplier_for(
        privacy.epsilon, privacy.delta, rate, steps * study.federation.rounds
    )
    return DpPlan(noise_multiplier=noise, sample_rate=rate, clip=privacy.clip), steps


def reserve(folder: Path, privacy: SitePrivacy, dp: DpPlan, steps: int) -> int:
    """Charge one round before it begins; returns how many were begun before it.

    A round that is asked for again is charged again: its noise is new, and so is what it says.

    Raises:
        BudgetSpent: the round would bring epsilon above what the hospital accepts.
        StorageError: the charge cannot be written down.
    """
    before = history(folder)
    after = (*before, (dp.noise_multiplier, dp.sample_rate, steps))
    epsilon = accounting.epsilon(after, privacy.delta)
    if epsilon > privacy.epsilon:
        raise BudgetSpent(
            f"Another round would bring epsilon to {epsilon:.2f}; this site allows "
            f"{privacy.epsilon:.2f} for this study. End the study, or agree a new limit."
        )
    tensors.write_atomic(_file(folder), json.dumps(after).encode())
    return len(before)


def spent(folder: Path, privacy: SitePrivacy) -> float:
    """Epsilon of all rounds begun so far, at the delta of `privacy`."""
    return accounting.epsilon(history(folder), privacy.delta)


def history(folder: Path) -> History:
    """The rounds begun so far. Raises StorageError: what cannot be read is not "nothing"."""
    file = _file(folder)
    if not file.exists():
        return ()
    try:
        return tuple((float(n), float(q), int(t)) for n, q, t in json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"{file}: what was spent cannot be read ({type(error).__name__}). Restore the file "
            "from a backup; without it nobody knows how much privacy is left."
        ) from None


def _file(folder: Path) -> Path:
    return folder / "privacy.json"
