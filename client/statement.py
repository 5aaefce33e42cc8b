"""What `medfl-client budget` says: spent, reserved and left by study, and a proposed study's cost.

For the hospital's own eyes: nothing here leaves it except, if it wants, the ledger's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medfl.client import budget
from medfl.client.composition import (
    Charge,
    Limit,
    largest_epsilon,
    most_steps,
    per_patient,
    spent,
    with_step,
)
from medfl.client.ledger import Entry, Ledger
from medfl.common import accounting
from medfl.common.messages import Part
from medfl.common.site import Site
from medfl.common.study import Study

Plain = dict[str, Any]


def statement(site: Site) -> Plain:
    """The ledger in numbers, as plain JSON types.

    Every epsilon is that of the patient who lost most, at the budget's delta (the site's, or
    1e-5, where it wrote no budget). Parts do not add up to the whole: it is less than their sum.

    Raises:
        StorageError: the ledger is damaged.
    """
    ledger, limit, delta = Ledger(site.ledger), _limit(site), _delta(site)
    entries = ledger.entries()
    total = spent(ledger.heaviest(), delta)
    head = ledger.head()
    return {
        "site": site.name,
        "delta": delta,
        "allowed": None if limit is None else limit.epsilon,
        "spent": total,
        "left": None if limit is None else max(0.0, limit.epsilon - total),
        "studies": [_study(entries, digest, delta) for digest in _studies(entries)],
        "head": {"lines": head.lines, "hash": head.hash},
    }


def proposed(site: Site, study: Study, patients: dict[Part, list[str]]) -> Plain | None:
    """What a study would cost this site's patients; None where nobody asks for privacy.

    patients: of each case, by part, as keyed hashes.

    Raises:
        PolicyRefused: the site does not declare how many patients it has.
    """
    terms = budget.terms_of(study, site.privacy)
    if terms is None:
        return None
    ledger, limit, delta = Ledger(site.ledger), _limit(site), _delta(site)
    uses = budget.whole_study(study, terms, "proposed", lambda part: patients[part])
    after = max(
        spent(with_step(ledger.heaviest(them), ledger.step_of(charge, them)), delta)
        for charge, them in uses
    )
    found: Plain = {
        "study": study.name,
        "rounds": study.federation.rounds,
        "epsilon": terms.epsilon,
        "delta": terms.delta,
        "unit": terms.unit,
        "after": after,
        "fits": limit is None or after <= limit.epsilon,
    }
    if limit is not None and not found["fits"]:
        found |= _what_fits(ledger, limit, study, terms.delta, *uses[0])
    return found


def _what_fits(
    ledger: Ledger, limit: Limit, study: Study, delta: float, charge: Charge, them: Sequence[str]
) -> Plain:
    """Rounds of this study, or its epsilon over all rounds, that the budget has room for."""
    histories, step = ledger.heaviest(them), ledger.step_of(charge, them)
    a_round = step[2] // study.federation.rounds
    return {
        "rounds_that_fit": most_steps(histories, step, limit) // max(1, a_round),
        "epsilon_that_fits": largest_epsilon(histories, step, limit, delta),
    }


def _study(entries: Sequence[Entry], digest: str, delta: float) -> Plain:
    mine = [e for e in entries if e.charge.study == digest]
    return {
        "study": mine[-1].charge.name,
        "digest": digest,
        "runs": len({e.charge.run for e in mine}),
        "uses": len(mine),
        "spent": _together([e for e in mine if e.settled], delta),
        "reserved": _together([e for e in mine if not e.settled], delta),
        "last": mine[-1].when,
    }


def _together(entries: Sequence[Entry], delta: float) -> float:
    """As if all of these had used the same patients, by purpose: parts of a study are disjoint."""
    purposes = {e.charge.purpose for e in entries}
    return max(
        (
            accounting.epsilon(
                [per_patient(e.charge, e.most_records) for e in entries if e.charge.purpose == p],
                delta,
            )
            for p in purposes
        ),
        default=0.0,
    )


def _studies(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(e.charge.study for e in entries))


def _limit(site: Site) -> Limit | None:
    if site.privacy is None or site.privacy.budget is None:
        return None
    return Limit(site.privacy.budget.epsilon, site.privacy.budget.delta)


def _delta(site: Site) -> float:
    limit = _limit(site)
    if limit is not None:
        return limit.delta
    return site.privacy.delta if site.privacy is not None else 1e-5


def describe(said: Plain, study: Plain | None) -> list[str]:
    """The same in sentences, for a person."""
    d = f"at delta {said['delta']:g}"
    lines = [f"{said['site']}: a patient has lost at most epsilon {_up(said['spent'])} {d}, ever."]
    if said["allowed"] is None:
        lines.append("site.toml sets no limit for everything: write [privacy.budget] epsilon.")
    else:
        lines.append(f"Allowed is {said['allowed']:g}; {said['left']:.2f} is left, or a bit more.")
    for row in said["studies"]:
        lines.append(
            f"  {row['study']} ({row['digest'][:12]}): spent {_up(row['spent'])}, reserved "
            f"{_up(row['reserved'])}, {row['uses']} uses in {row['runs']} "
            f"run{'s' if row['runs'] > 1 else ''}, last {row['last']}"
        )
    head = said["head"]
    if head["lines"]:
        lines.append(f"Head of the ledger, to keep elsewhere: {head['lines']} {head['hash']}")
    return lines + ([] if study is None else _describe_proposed(study, said))


def _describe_proposed(study: Plain, said: Plain) -> list[str]:
    lines = [
        f"{study['study']} would spend up to epsilon {study['epsilon']:g} at delta "
        f"{study['delta']:g} per {study['unit']}, and bring the patient who has lost most of those "
        f"in it to {_up(study['after'])} at delta {said['delta']:g}."
    ]
    if study["fits"]:
        return [*lines, "It fits."]
    return [
        *lines,
        f"It does not fit. {study['rounds_that_fit']} of its {study['rounds']} rounds would, or "
        f"all of them with an epsilon of {study['epsilon_that_fits']:.2f}.",
    ]


def _up(epsilon: float) -> str:
    """Two decimals, rounded up: a loss is never written smaller than it is."""
    return f"{-(-epsilon * 100 // 1) / 100:.2f}"
