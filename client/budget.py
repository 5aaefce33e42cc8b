"""What privacy a hospital's work spends: how much noise, what may be spent, what was.

The ledger counts per patient and over everything (`medfl.client.ledger`); here a study's own
terms meet it: its epsilon per its own unit, the hospital's budget, and the noise that keeps both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from medfl.client.composition import (
    Charge,
    Limit,
    Step,
    largest_epsilon,
    most_steps,
    spent,
    with_step,
)
from medfl.client.ledger import Check, Entry, Ledger
from medfl.client.training.plan import DpPlan
from medfl.common import accounting
from medfl.common.errors import BudgetSpent, PolicyRefused
from medfl.common.messages import Part
from medfl.common.site import SitePrivacy
from medfl.common.study import Study, unprotected_anywhere

Purpose = Literal["training", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which privacy this hospital works for one study.

    epsilon, delta, clip, unit: of the training, the stricter of study and hospital.
    clip_quantile: the share of units that the bound should leave as they are; None: it stays.
    metrics_epsilon: of the metrics on patients that are not trained on; None: none are released.
    ever: the hospital's limit for everything; None: it wrote none.
    n_units, n_cases: declared, not counted, outside of a simulation.
    """

    epsilon: float
    delta: float
    clip: float
    clip_quantile: float | None
    unit: Literal["patient", "record"]
    metrics_epsilon: float | None
    ever: Limit | None
    n_units: int | None
    n_cases: int | None


def terms_of(study: Study, site: SitePrivacy | None) -> Terms | None:
    """The stricter of what the study and the hospital ask for; None where neither asks."""
    asked = study.privacy
    if asked is None and site is None:
        return None
    both = [p for p in (asked, site) if p is not None]
    unit = asked.unit if asked is not None else "patient"
    patients = site.declared_patients if site is not None else None
    cases = (site.declared_cases if site is not None else None) or patients
    return Terms(
        epsilon=min(p.epsilon for p in both),
        delta=min(p.delta for p in both),
        clip=both[0].clip,
        clip_quantile=asked.clip_quantile if asked is not None else None,
        unit=unit,
        metrics_epsilon=asked.metrics_epsilon if asked is not None else None,
        ever=Limit(site.budget.epsilon, site.budget.delta)
        if site is not None and site.budget is not None
        else None,
        n_units=patients if unit == "patient" else cases,
        n_cases=cases,
    )


def counted(terms: Terms, patients: Sequence[str]) -> Terms:
    """The terms with exact numbers where none were declared: only for a simulation."""
    n_units = len(set(patients)) if terms.unit == "patient" else len(patients)
    return replace(terms, n_units=terms.n_units or n_units, n_cases=terms.n_cases or len(patients))


def refuse_undeclared(terms: Terms) -> None:
    """Raises PolicyRefused: the hospital does not say how many patients it has."""
    if terms.n_units is None:
        name = "declared_patients" if terms.unit == "patient" else "declared_cases"
        raise PolicyRefused(
            f"privacy.{name} is missing in site.toml. Write about how many training "
            f"{'patients' if terms.unit == 'patient' else 'cases'} this hospital has: the exact "
            "number is private, and others learn the declared one."
        )
    if terms.delta * terms.n_units >= 1:
        raise PolicyRefused(
            f"delta {terms.delta:g} is not below one over the {terms.n_units} units of this "
            "hospital. Agree a smaller privacy.delta."
        )


def refuse_unprotected(study: Study) -> None:
    """A private hospital lets nothing out of its records that no noise protects.

    Raises:
        PolicyRefused: with the keys of the study that read records outside of the training.
    """
    if keys := unprotected_anywhere(study):
        raise PolicyRefused(
            "This site trains under differential privacy, and the study computes something from "
            f"its records without noise: {'; '.join(keys)}. Ask the coordinator to publish it so."
        )


def dp_plan(study: Study, terms: Terms) -> tuple[DpPlan, int]:
    """The plan of every round, with a fresh key, and its steps; all rounds keep `epsilon`."""
    from medfl.client.training.schedule import private_steps_in_round, sample_rate_for

    refuse_undeclared(terms)
    n_units = terms.n_units or 1
    rate = sample_rate_for(study, n_units)
    steps = private_steps_in_round(study, rate)
    noise = accounting.noise_multiplier_for(
        terms.epsilon, terms.delta, rate, steps * study.federation.rounds
    )
    plan = DpPlan(noise, rate, terms.clip, terms.clip_quantile, unit=terms.unit, n_declared=n_units)
    return plan, steps


def metrics_noise(study: Study, terms: Terms) -> float:
    """Noise of one release of metrics: each round's, the last model's, and the final one."""
    if terms.metrics_epsilon is None:
        raise PolicyRefused("The study states no privacy.metrics_epsilon; no metrics are released.")
    releases = study.federation.rounds + 2
    return accounting.noise_multiplier_for(terms.metrics_epsilon, terms.delta, 1.0, releases)


def charge_for(
    study: Study, run: str, purpose: Purpose, round_: int, step: Step, unit: str
) -> Charge:
    """One use as the ledger writes it."""
    return Charge(
        study=study.digest,
        name=study.name,
        run=run,
        purpose=purpose,
        round=round_,
        noise_multiplier=step[0],
        sample_rate=step[1],
        steps=step[2],
        unit="patient" if unit == "patient" else "record",
    )


def reserve(ledger: Ledger, terms: Terms, charge: Charge, patients: Sequence[str]) -> Entry:
    """Write a use into the ledger before it begins.

    A round that is asked for again is charged again: its noise is new, and so is what it says.

    Raises:
        BudgetSpent: it would exceed the study's epsilon or the hospital's budget.
        StorageError: it cannot be written down.
    """
    return ledger.reserve(charge, patients, allowed(terms, charge))


def whole_study(
    study: Study, terms: Terms, run: str, patients: Callable[[Part], Sequence[str]]
) -> list[tuple[Charge, Sequence[str]]]:
    """Everything that a study will charge, as one use for each part of the patients."""
    dp, steps = dp_plan(study, terms)
    rounds = study.federation.rounds
    training = (dp.noise_multiplier, dp.sample_rate, steps * rounds)
    uses = [(charge_for(study, run, "training", 0, training, terms.unit), patients("train"))]
    if terms.metrics_epsilon is not None:
        noise = metrics_noise(study, terms)
        releases_of: dict[Literal["validation", "test"], int] = {
            "validation": rounds + 2,
            "test": 1,
        }
        for part, releases in releases_of.items():
            step = (noise, 1.0, releases)
            charge = charge_for(study, run, part, 0, step, "patient")
            uses.append((charge, patients(part)))
    return [(charge, them) for charge, them in uses if them]


def refuse_too_much(
    ledger: Ledger, terms: Terms, uses: Sequence[tuple[Charge, Sequence[str]]]
) -> None:
    """Raises BudgetSpent where a study would not fit the hospital's budget; nothing is written."""
    if terms.ever is not None:
        for charge, them in uses:
            step, histories = ledger.step_of(charge, them), ledger.heaviest(them)
            _refuse_beyond(terms.ever, histories, step, terms.delta)


def allowed(terms: Terms, charge: Charge) -> Check:
    """The check of one use against the study's own epsilon and the hospital's budget."""

    def check(histories: list[list[Step]], step: Step, before: tuple[Entry, ...]) -> None:
        mine = [charge.step, *_steps_of(before, charge.study, charge.purpose)]
        limit = terms.epsilon if charge.purpose == "training" else terms.metrics_epsilon or 0.0
        total = accounting.epsilon(tuple(mine), terms.delta)
        if total > limit:
            raise BudgetSpent(
                f"This use would bring epsilon of study {charge.name} to {total:.2f}; it may be "
                f"{limit:.2f}. End the study, or agree a new limit."
            )
        if terms.ever is not None:
            _refuse_beyond(terms.ever, histories, step, terms.delta)

    return check


def _refuse_beyond(limit: Limit, histories: list[list[Step]], step: Step, delta: float) -> None:
    after = spent(with_step(histories, step), limit.delta)
    if after <= limit.epsilon:
        return
    fits = most_steps(histories, step, limit)
    most = largest_epsilon(histories, step, limit, delta)
    other = f", or all {step[2]} of them with an epsilon of {most:.2f}" if most > 0 else ""
    raise BudgetSpent(
        f"This would bring what a patient has lost to epsilon {after:.2f} at delta "
        f"{limit.delta:g}; privacy.budget of this site allows {limit.epsilon:.2f} ever, and "
        f"{spent(histories, limit.delta):.2f} is spent or reserved. {fits} of its {step[2]} steps "
        f"would fit{other}. Agree a smaller study; a larger budget is the hospital's decision."
    )


def study_epsilon(ledger: Ledger, study: Study, terms: Terms) -> float:
    """Epsilon of all training for one study so far, per its unit, at the terms' delta."""
    steps = _steps_of(ledger.entries(), study.digest, "training")
    return accounting.epsilon(tuple(steps), terms.delta)


def _steps_of(entries: Sequence[Entry], study: str, purpose: str) -> list[Step]:
    return [
        e.charge.step for e in entries if (e.charge.study, e.charge.purpose) == (study, purpose)
    ]
