"""What a hospital does otherwise under privacy: it charges first, and says less."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from medfl.client import budget, home
from medfl.client.data.cases import Cohort
from medfl.client.ledger import Entry
from medfl.client.released import Summary, of_nobody, with_noise, withheld
from medfl.client.training.plan import DpPlan
from medfl.common import tensors
from medfl.common.messages import PARTS, Instruction, Part
from medfl.common.metrics import summarise
from medfl.common.noise import fresh_key, key_from

if TYPE_CHECKING:
    from medfl.client.hospital import Hospital


# Charged where there is no training patient: the steps are taken all the same, of noise alone, and
# what is told of privacy spent is as with one.
NOBODY = ("nobody",)


def charged(
    hospital: Hospital, terms: budget.Terms, asked: Instruction, patients: Sequence[str]
) -> tuple[DpPlan, Entry]:
    """The privacy of one round's steps, which is in the ledger when this returns.

    Raises:
        BudgetSpent: the round does not fit; nothing was touched.
    """
    study = hospital.study
    dp, steps = budget.dp_plan(study, terms)
    step = (dp.noise_multiplier, dp.sample_rate, steps)
    charge = budget.charge_for(study, asked.run, "training", asked.round, step, terms.unit)
    entry = budget.reserve(hospital.ledger, terms, charge, patients or NOBODY)
    if dp.quantile is not None:
        moved = home.bound(hospital.state).as_of(asked.round - 1)
        dp = replace(dp, clip=float(moved["clip"])) if moved else dp
    return replace(dp, key=_key(hospital, asked, entry)), entry


def told(hospital: Hospital, asked: Instruction, part: Part) -> tuple[Summary, Entry | None]:
    """What is said of one part's scores: all; under privacy nothing, or what is charged now.

    Under masks nothing either: what one hospital says of weights that the coordinator chose tells
    of its labels what the masks hide.
    """
    study, terms, patients = hospital.study, hospital.terms, hospital.patients(part)
    if terms is None:
        return (summarise if study.secure_aggregation is None else withheld), None
    if terms.metrics_epsilon is None or part == "train":
        return withheld, None
    noise = budget.metrics_noise(study, terms)
    if not patients:  # nobody to charge
        key = fresh_key() if not hospital.simulated else key_from(asked.seed, part, asked.round)
        return lambda task, _, names: of_nobody(task, noise, key, names), None
    charge = budget.charge_for(study, asked.run, part, asked.round, (noise, 1.0, 1), "patient")
    entry = budget.reserve(hospital.ledger, terms, charge, patients)
    return with_noise(noise, _key(hospital, asked, entry)), entry


def _key(hospital: Hospital, asked: Instruction, entry: Entry) -> bytes:
    """Of noise and sampling: fresh, or in a simulation from the seed, another for each use."""
    if not hospital.simulated:
        return fresh_key()
    # The same noise twice would cancel out in the difference of two answers.
    return key_from(asked.seed, "site", hospital.name, "use", entry.number)


def counted(cohort: Cohort, smallest: int = 0) -> dict[str, Any]:
    """Cases by part, and cases left out by reason; numbers below `smallest` stay unsaid."""
    numbers: dict[str, Mapping[Any, int]] = {
        "counts": {part: len(cohort.positions(part)) for part in PARTS},
        "left_out": Counter(case.reason for case in cohort.quarantined),
    }
    return {
        what: {name: n for name, n in found.items() if n >= smallest}
        for what, found in numbers.items()
    }


def note_cohort(hospital: Hospital) -> None:
    """For the hospital, and for a simulation's report: these exact numbers do not leave."""
    facts = {**counted(hospital.cohort), "cohort": hospital.cohort.digest}
    tensors.write_atomic(hospital.folder / "cohort.json", json.dumps(facts).encode())
