"""medfl-server's commands around studies and their runs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medfl.server.federation import Federation
    from medfl.server.records import RoundRecord
    from medfl.server.runs import Run

Folder = Annotated[
    Path,
    typer.Option("--folder", envvar="MEDFL_SERVER_FOLDER", help="The federation's folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HERE = Path(".")
NO_STUDY = "No study yet. Next: medfl-server study publish STUDY.toml"
NO_RUN = "No run yet. Next: medfl-server run STUDY"
_LOOK_S = 0.3

study_app = typer.Typer(no_args_is_help=True, help="Publish studies, and see who approves.")
model_app = typer.Typer(no_args_is_help=True, help="Get the model of a run.")


def add_run_commands(app: typer.Typer) -> None:
    """Add `study`, `run`, `resume`, `runs` and `model` to the command."""
    app.add_typer(study_app, name="study")
    app.add_typer(model_app, name="model")
    app.command()(run)
    app.command()(resume)
    app.command()(runs)


@study_app.command()
def publish(
    study: Annotated[Path, typer.Argument(help="The study file (study.toml).")],
    folder: Folder = HERE,
    replace: Annotated[
        bool, typer.Option("--replace", help="Withdraw another study of this name.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check, sign and offer a study; the same study again changes nothing.

    Another study under a name that is taken is refused, line by line, unless it is to replace it.

    Example: medfl-server study publish lung.toml --folder ~/fed
    """
    from medfl.common.study import load_study
    from medfl.server import studies
    from medfl.server.settings import open_federation

    made = studies.publish(open_federation(folder), load_study(study), replace=replace)
    lines = [
        f"Published {made.name}, digest {made.digest}.",
        f"Hospitals now see it: medfl-client studies; medfl-client show {made.name}; "
        f"medfl-client approve {made.name}",
        f"Next: medfl-server run {made.name} --folder {folder}",
    ]
    _show({"name": made.name, "digest": made.digest}, lines, as_json)


@study_app.command()
def withdraw(
    study: Annotated[str, typer.Argument(help="A published study: name, or digest's beginning.")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Offer a study no longer; models that it has trained stay.

    Example: medfl-server study withdraw lung --folder ~/fed
    """
    from medfl.server import studies
    from medfl.server.settings import open_federation

    federation = open_federation(folder)
    made = studies.find(federation, study)
    studies.withdraw(federation, made)
    lines = [f"{made.name} ({made.digest[:12]}) is offered no longer.", "Next: medfl-server status"]
    _show({"name": made.name, "digest": made.digest}, lines, as_json)


@study_app.command("list")
def list_(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """List published studies, and what each hospital has decided.

    Example: medfl-server study list --folder ~/fed
    """
    from medfl.server import studies
    from medfl.server.settings import open_federation

    federation = open_federation(folder)
    plain, lines = [], []
    for made in studies.published(federation):
        stands = {}
        for site in federation.sites():
            decision = studies.decision_of(federation, made.digest, site.name)
            why = studies.refusal(federation, site, decision, made.digest)
            stands[site.name] = why or "approved"
        plain.append({"name": made.name, "digest": made.digest, "at": made.at, "sites": stands})
        lines.append(f"{made.name}  {made.digest[:12]}")
        lines += [f"  {site}: {stand}" for site, stand in stands.items()]
    _show({"studies": plain}, lines or [NO_STUDY], as_json)


def run(
    study: Annotated[str, typer.Argument(help="A published study: name, or digest's beginning.")],
    folder: Folder = HERE,
    seed: Annotated[
        int | None,
        typer.Option(help="Same seed and sites, same bits, on the CPU.", show_default="42"),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for approvals and connections.")
    ] = 3600.0,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds for a round's answers.")] = 3600.0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Only ask for it; look with `runs`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a study: wait for the quorum, show each round, end with a model.

    The running server does the work; Ctrl-C leaves it going. Where the study runs already, this
    looks on.

    Example: medfl-server run lung --folder ~/fed
    """
    from medfl.common.errors import ConfigError
    from medfl.server import runs as queue
    from medfl.server import service, studies
    from medfl.server.settings import open_federation

    federation = open_federation(folder)
    made = studies.find(federation, study)
    asked = queue.latest(federation, made.name)
    if asked is None or asked.digest != made.digest:
        rounds = int(json.loads(made.study)["federation"]["rounds"])
        drawn = 42 if seed is None else seed
        asked = queue.ask(federation, made, rounds, seed=drawn, wait_s=wait, deadline_s=deadline)
    elif seed not in (None, asked.seed):
        raise ConfigError(
            f"--seed: {asked.id} is {asked.state} with seed {asked.seed}. Leave --seed out to look "
            f"on, or wait for its end, or end it with: medfl-server stop {asked.id}"
        )
    if detach:
        lines = [f"Asked for {asked.id}.", f"Next: medfl-server runs --folder {folder}"]
        _show({"run": asked.id, "state": asked.state}, lines, as_json)
        return
    if service.running_pid(federation) is None and not as_json:
        typer.echo(f"The server does not run; start it: medfl-server start --folder {folder}")
    _look_on(federation, asked.id, as_json)


def resume(
    run: Annotated[str, typer.Argument(help="A run that failed, was stopped or is paused.")],
    folder: Folder = HERE,
    detach: Annotated[
        bool, typer.Option("--detach", help="Only ask for it; look with `runs`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run after the last round that it finished.

    What a server left running when it ended goes on by itself at the next start.

    Example: medfl-server resume lung-20270115-080000-ab12 --folder ~/fed
    """
    from medfl.server import runs as queue
    from medfl.server.settings import open_federation

    federation = open_federation(folder)
    again = queue.resume(federation, run)
    if detach:
        lines = [f"{run} goes on after round {again.round}.", "Next: medfl-server runs"]
        _show(_plain(again), lines, as_json)
        return
    _look_on(federation, run, as_json)


def runs(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """List all runs, oldest first, and how each ended.

    Example: medfl-server runs --folder ~/fed
    """
    from medfl.server import runs as queue
    from medfl.server.settings import open_federation

    federation = open_federation(folder)
    found, lines = queue.everything(federation), []
    for r in found:
        why = r.why or queue.queued_behind(federation, r)
        lines.append(f"{r.id}  {r.state}, round {r.round} of {r.rounds}  {why}".rstrip())
        lines += [f"  without {each}" for each in r.missing if r.state != "waiting"]
    _show({"runs": [_plain(r) for r in found]}, lines or [NO_RUN], as_json)


@model_app.command()
def get(
    run: Annotated[str, typer.Argument(help="The run.")],
    out: Annotated[Path, typer.Option(help="Where to put the file (safetensors).")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Copy a run's model, checked against the digest that the audit log holds.

    Example: medfl-server model get lung-20270115-080000-ab12 --out model.safetensors
    """
    from medfl.common.errors import StorageError
    from medfl.server import runs as queue
    from medfl.server.settings import open_federation

    federation = open_federation(folder)
    source = queue.model_of(federation, run)
    try:
        shutil.copyfile(source, out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror})") from None
    digest = queue.sha256(out)
    _show({"file": str(out), "sha256": digest}, [f"{out}  SHA-256 {digest}"], as_json)


@model_app.command("so-far")
def so_far(
    run: Annotated[str, typer.Argument(help="A run that is not done.")],
    out: Annotated[Path, typer.Option(help="Where to put the file (safetensors).")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Write the best model so far (by the study's keep), while the run goes on or after it failed.

    No hospital is asked for it. The audit log gets the file's digest.

    Example: medfl-server model so-far lung-20270115-080000-ab12 --out so-far.safetensors
    """
    from medfl.server import so_far as early
    from medfl.server.settings import open_federation

    round_, digest = early.copy(open_federation(folder), run, out)
    plain = {"file": str(out), "sha256": digest, "round": round_}
    _show(plain, [f"{out}  the model of round {round_}, SHA-256 {digest}"], as_json)


def _look_on(federation: Federation, run_id: str, as_json: bool) -> None:
    """Show a run to its end, and exit with its code."""
    over = _follow(federation, run_id, quiet=as_json)
    lines = [f"{over.id}: {over.state} after {over.round} rounds. {over.why}".rstrip()]
    lines += [f"  without {each}" for each in over.missing]
    if over.state == "done" or over.model:
        lines.append(f"Next: medfl-server report {over.id}")
    _show(_plain(over), lines, as_json)
    raise typer.Exit(over.exit_code)


def _follow(federation: Federation, run_id: str, *, quiet: bool) -> Run:
    """Tell what happens until the run is over."""
    from medfl.server import runs as queue

    shown: RoundRecord | None = None
    missing: tuple[str, ...] = ()
    behind = ""
    while True:
        now = queue.load(federation, run_id)
        queued = queue.queued_behind(federation, now)
        if queued and queued.split(",")[:2] != behind.split(",")[:2] and not quiet:
            typer.echo(f"Waiting. {queued}")
        behind = queued
        if now.missing != missing:
            missing = now.missing
            if not quiet and (told := _told_missing(now)):
                typer.echo(told)
        for record in queue.progress(federation, run_id):
            if shown is None or record.round > shown.round:
                shown = record
                if not quiet:
                    typer.echo(_round_line(record, now.rounds))
        if now.state in queue.OVER:
            return now
        time.sleep(_LOOK_S)


def _told_missing(run: Run) -> str:
    """Who is waited for, or goes without; "" where there is nothing to say."""
    named = "; ".join(run.missing)
    if run.state == "waiting":
        return f"Waiting. Missing: {named or 'nobody any more'}"
    return f"Without: {named}" if named else ""


def _round_line(record: RoundRecord, rounds: int) -> str:
    metrics = " ".join(
        f"{name}={value:.4f}"
        for name, value in list(record.metrics.items())[:3]
        if value is not None
    )
    left_out = "".join(f"; without {s} ({why})" for s, why in sorted(record.left_out.items()))
    void = " VOID" if record.void else ""
    from medfl.server.records import slowest

    what = f"round {record.round}/{rounds}" if record.trained else "the last model"
    waited = f"; {text}" if (text := slowest(record)) else ""
    sites = f"{len(record.sites)} sites, {record.seconds:.1f} s"
    return f"{what}{void}: {sites} {metrics}{waited}{left_out}"


def _plain(run: Run) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(run)


def _show(plain: Any, lines: list[str], as_json: bool) -> None:
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))
