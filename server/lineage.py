"""Which models used a hospital's cohort, and what would have to be trained again without it.

All of it is read from the audit log: an approval says which cohort (digest) a site stands for, and
a round says which sites were in it. A model that starts from an affected one is affected, too.
This is a plan. It takes nothing out of a model: only training again without the cohort does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medfl.common.errors import ConfigError
from medfl.server import studies
from medfl.server.federation import Federation


@dataclass(frozen=True, slots=True)
class Affected:
    """One run that is not what it would be without the cohort.

    rounds: in which the cohort was trained on. models: digest of the weights after each affected
    round, by its number. model: SHA-256 of the run's file, "" where the run has none or it is from
    an earlier round. because: the model that it started from, where that is the reason.
    """

    run: str
    study: str
    digest: str
    sites: tuple[str, ...]
    rounds: tuple[int, ...]
    models: Mapping[int, str]
    model: str
    because: str = ""


@dataclass(slots=True)
class _Run:
    """A run as the audit log tells it."""

    digest: str
    rounds: dict[int, str] = field(default_factory=dict)
    uses: list[tuple[int, str, str]] = field(default_factory=list)
    model: str = ""
    selected: int = 0


def affected_by(federation: Federation, who: str) -> list[Affected]:
    """Runs that used a site (its name) or one cohort (the beginning of its digest).

    Raises:
        ConfigError: there is neither.
    """
    known = _cohorts(federation)
    sites = {site for site, _, _ in known}
    fits = {cohort for _, _, cohort in known if len(who) >= 6 and cohort.startswith(who)}
    if who not in sites and len(fits) != 1:
        raise ConfigError(
            f"{who}: is neither a site that has approved a study nor the beginning (6 characters "
            "or more) of one approved cohort's digest; `medfl-client lineage` tells it"
        )
    named = {p.digest: p.name for p in studies.ever_published(federation)}
    found: list[Affected] = []
    everything = _runs(federation)
    for run_id, run in everything.items():
        uses = [u for u in run.uses if u[1] == who or (who not in sites and u[2] in fits)]
        if uses:
            found.append(_affected(run_id, run, uses, named))
    return found + _descendants(federation, everything, found, named)


def _affected(
    run_id: str, run: _Run, uses: Sequence[tuple[int, str, str]], named: Mapping[str, str]
) -> Affected:
    first = min(number for number, _, _ in uses)
    return Affected(
        run=run_id,
        study=named.get(run.digest, ""),
        digest=run.digest,
        sites=tuple(sorted({site for _, site, _ in uses})),
        rounds=tuple(sorted({number for number, _, _ in uses})),
        models={n: model for n, model in sorted(run.rounds.items()) if n >= first},
        model=run.model if run.selected >= first else "",
    )


def _descendants(
    federation: Federation,
    everything: Mapping[str, _Run],
    found: Sequence[Affected],
    named: Mapping[str, str],
) -> list[Affected]:
    """Runs of studies that start from an affected run's model, and from theirs."""
    starts = {
        p.digest: json.loads(p.study)["model"].get("start_weights_sha256") or ""
        for p in studies.ever_published(federation)
    }
    spoilt, known = {a.model for a in found if a.model}, {a.run for a in found}
    added: list[Affected] = []
    grew = True
    while grew:
        grew = False
        for run_id, run in everything.items():
            start = starts.get(run.digest, "")
            if run_id in known or start not in spoilt:
                continue
            models = dict(sorted(run.rounds.items()))
            study = named.get(run.digest, "")
            added.append(Affected(run_id, study, run.digest, (), (), models, run.model, start))
            known.add(run_id)
            spoilt |= {run.model} - {""}
            grew = True
    return added


def _cohorts(federation: Federation) -> list[tuple[str, str, str]]:
    """(site, study, cohort) of every approval, oldest first."""
    return [
        (about["site"], about["study"], about["cohort"])
        for what, about in _lines(federation)
        if what == "approved"
    ]


def _runs(federation: Federation) -> dict[str, _Run]:
    """Every run; a round used each cohort that its sites stood for since the round before.

    An approval may be renewed while a round is on its way; then both cohorts count as used.
    """
    found: dict[str, _Run] = {}
    stood: dict[str, dict[tuple[str, str], set[str]]] = {}
    standing: dict[tuple[str, str], str] = {}
    for what, about in _lines(federation):
        run = str(about.get("run", ""))
        if what == "approved":
            key = about["site"], about["study"]
            standing[key] = about["cohort"]
            for cohorts in stood.values():
                cohorts.setdefault(key, set()).add(about["cohort"])
        elif what == "run asked for":
            found[run] = _Run(about["study"])
        elif run not in found:
            continue
        elif what == "run started":
            stood[run] = {key: {cohort} for key, cohort in standing.items()}
        elif what == "round":
            _add_round(found[run], about, stood.setdefault(run, {}))
            stood[run] = {key: {cohort} for key, cohort in standing.items()}
        elif what == "model":
            found[run].model, found[run].selected = about["sha256"], about["round"]
    return found


def _add_round(
    run: _Run, about: Mapping[str, Any], stood: Mapping[tuple[str, str], Iterable[str]]
) -> None:
    number = about["round"]
    run.rounds[number] = about["model"]
    for site in about["sites"]:
        run.uses += [(number, site, c) for c in sorted(stood.get((site, run.digest), ()))]


def _lines(federation: Federation) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for line in federation.audit.lines():
        yield line["what"], line["about"]
