"""medfl-server plan-without: what a hospital's cohort is in, and how to train without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from medfl.server.cli_runs import HERE, AsJson, Folder

if TYPE_CHECKING:
    from medfl.server.federation import Federation
    from medfl.server.lineage import Affected


def plan_without(
    who: Annotated[str, typer.Argument(help="A site, or the beginning of a cohort's digest.")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Say which runs and models used a site or cohort, and what to run again without it.

    It takes nothing out of a model, and no model that was published forgets anything: only one
    that is trained again without the cohort has never seen it.

    Example: medfl-server plan-without st-marys --folder ~/fed
    """
    from dataclasses import asdict

    from medfl.server import lineage
    from medfl.server.settings import open_federation

    federation = open_federation(folder)
    found = lineage.affected_by(federation, who)
    whole = who in {site.name for site in federation.sites()}
    steps = _steps(federation, found, who, whole=whole, folder=str(folder))
    plain = {"without": who, "affected": [asdict(a) for a in found], "next": steps}
    if as_json:
        typer.echo(json.dumps(plain))
        return
    lines = [line for a in found for line in _described(a)] or [f"Nothing was trained on {who}."]
    typer.echo("\n".join([*lines, *(f"{n}. {step}" for n, step in enumerate(steps, 1))]))


def _described(affected: Affected) -> list[str]:
    a = affected
    used = f"rounds {', '.join(map(str, a.rounds))} of {', '.join(a.sites)}"
    why = f"starts from {a.because[:12]}, which is affected" if a.because else f"used in {used}"
    first, last = (min(a.models), max(a.models)) if a.models else (0, 0)
    lines = [f"{a.run} ({a.study}): {why}; every model from round {first} to {last} depends on it."]
    return lines + ([f"  published model: SHA-256 {a.model}"] if a.model else [])


def _steps(
    federation: Federation, found: Sequence[Affected], who: str, *, whole: bool, folder: str
) -> list[str]:
    """What people do, in order; nothing where nothing is affected."""
    if not found:
        return []
    names = list(dict.fromkeys(a.study for a in found if not a.because))
    steps = [f"Withdraw what must not be used: the published models of {len(found)} runs above."]
    for name in names:
        if whole:
            steps.append(f"At {who}: medfl-client withdraw {name}")
        else:
            steps.append(
                "At the hospital: medfl-client exclude site.toml PATIENT; "
                f"medfl-client approve {name}"
            )
        steps.append(f"Here: medfl-server run {name} --folder {folder}")
        steps += _too_few(federation, found, name) if whole else []
    for name in dict.fromkeys(a.study for a in found if a.because):
        steps.append(
            f"Publish {name} again with the new model as start_weights, then: medfl-server run "
            f"{name} --folder {folder}"
        )
    return steps


def _too_few(federation: Federation, found: Sequence[Affected], name: str) -> list[str]:
    """A word where the quorum would be missed without the site."""
    from medfl.server import studies

    made = studies.find(federation, name)
    need = int(json.loads(made.study)["federation"]["min_sites"])
    left = set(studies.approvals(federation, made.digest)) - {s for a in found for s in a.sites}
    if len(left) >= need:
        return []
    return [
        f"Without it {len(left)} sites have approved {name}, which asks for {need}: invite another."
    ]
