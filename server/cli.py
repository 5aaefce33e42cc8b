"""medfl-server: what a coordinator runs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medfl.common import cli
from medfl.server.cli_lineage import plan_without
from medfl.server.cli_operation import add_operation_commands
from medfl.server.cli_report import report
from medfl.server.cli_runs import add_run_commands

if TYPE_CHECKING:
    from medfl.server.federation import Federation
    from medfl.server.runs import Run

app = cli.new_app()

Folder = Annotated[
    Path,
    typer.Option("--folder", envvar="MEDFL_SERVER_FOLDER", help="The federation's folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HERE = Path(".")


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit codes are those of `medfl.common.errors`."""
    return cli.run(app, argv, "medfl-server")


@app.callback()
def _options(version: cli.Version = False) -> None:
    """Coordinate studies between hospitals that keep their data.

    Settings come from server.toml, then from MEDFL_SERVER_LISTEN and so on, then from flags.

    Example: medfl-server init ~/fed --name "Lung study group"
    """


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder for keys, settings and state.")],
    name: Annotated[str, typer.Option(help="What people call the federation.")],
    listen: Annotated[str, typer.Option(help="Address and port of the gateway.")] = "0.0.0.0:8443",
    address: Annotated[
        str, typer.Option(help="host:port under which hospitals reach it, for invitations.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Make a federation: its authority, the coordinator's keys and settings.

    On a folder that is one already, nothing is changed.

    Example: medfl-server init ~/fed --name "Lung study group" --address fed.example.org:443
    """
    from medfl.server import authority
    from medfl.server.settings import ServerSettings, load_settings

    settings = ServerSettings(name=name, listen=listen, address=address)
    if faults := settings.faults():
        from medfl.common.errors import ConfigError

        raise ConfigError([f"--{fault}" for fault in faults])
    was_there = (folder / "server.toml").exists()
    federation = authority.init(folder, settings, time.time())
    kept = load_settings(folder).name
    fingerprint = authority.authority_fingerprint(federation)
    plain = {"folder": str(folder), "name": kept, "fingerprint": fingerprint, "made": not was_there}
    lines = [
        f"Is there already: {kept}, in {folder}; its settings are in server.toml."
        if was_there
        else f"Made: {kept}, in {folder}.",
        f"Fingerprint of the authority: {fingerprint}",
        "Back this folder up where only you can read it: who has keys/ is the coordinator.",
        f"Next: medfl-server invite SITE --folder {folder}",
    ]
    _show(plain, lines, as_json)


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="The hospital's name: letters, digits, - and _.")],
    folder: Folder = HERE,
    hours: Annotated[float | None, typer.Option(min=0.01, help="Life of the token.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="The site is enrolled and has lost its keys.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a token with which one hospital can enrol once.

    Send the text over a channel that you trust, and the fingerprint over another.

    Example: medfl-server invite st-marys --folder ~/fed
    """
    from medfl.common import invitation
    from medfl.server import authority

    federation, settings = _opened(folder)
    life = hours or settings.invitation_hours
    token = authority.invite(federation, site, life, again=again)
    text, fingerprint = invitation.to_text(token), authority.authority_fingerprint(federation)
    address = settings.address or f"COORDINATOR:{settings.listen.rpartition(':')[2]}"
    command = f"medfl-client enrol {address} --token {text}"
    unsaid = (
        []
        if settings.address
        else ["COORDINATOR stands for how hospitals reach this machine: `address` in server.toml."]
    )
    plain = {
        "site": site,
        "token": text,
        "expires": federation.clock() + life * 3600,
        "command": command,
        "fingerprint": fingerprint,
    }
    lines = [
        f"Send this to {site}; it serves once, for {life:g} hours:",
        "",
        f"  {command}",
        "",
        *unsaid,
        f"It must then show this fingerprint; compare it over the telephone: {fingerprint}",
        f"Next: medfl-server start --folder {folder}",
    ]
    _show(plain, lines, as_json)


@app.command()
def start(
    folder: Folder = HERE,
    listen: Annotated[str | None, typer.Option(help="Address and port of the gateway.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Answer hospitals and work off runs, in the foreground, until SIGTERM or Ctrl-C.

    Example: medfl-server start --folder ~/fed
    """
    cli.log_to_stderr(verbose)
    from medfl.common.notify import tell
    from medfl.server import authority, service
    from medfl.server.settings import load_settings

    federation, _ = _opened(folder)
    settings = load_settings(folder, {"listen": listen})

    for text in authority.ending(federation):
        typer.echo(text, err=True)

    def ready(port: int) -> None:
        host = settings.listen.rpartition(":")[0]
        typer.echo(f"{federation.name}: listening on {host}:{port}. Stop with Ctrl-C.")
        typer.echo(f"Next: medfl-server study publish STUDY.toml --folder {folder}")
        tell("READY=1", f"STATUS=listening on {host}:{port}")

    service.serve(federation, settings, ready)
    typer.echo("Stopped; nothing is lost.")


@app.command()
def status(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Say whether the server runs, who takes part and what is running.

    Example: medfl-server status --folder ~/fed --json
    """
    from medfl.common import certificates
    from medfl.server import authority, backup, heads, runs, service, studies

    federation, settings = _opened(folder)
    pid, checked = service.running_pid(federation), heads.check(federation)
    open_runs = [r for r in runs.everything(federation) if r.state not in runs.OVER]
    against = {r.id: _against_the_rest(federation, r) for r in open_runs}
    days = (certificates.ends_at(federation.gateway()[1]) - federation.clock()) / 86400
    names = [p.name for p in studies.published(federation)]
    put_back = backup.unconfirmed(federation)
    plain = {
        "name": federation.name,
        "put_back": put_back,
        "running": pid is not None,
        "listen": settings.listen,
        "sites": len([s for s in federation.sites() if s.status == "active"]),
        "studies": names,
        "runs": {r.id: r.state for r in open_runs},
        "missing": {r.id: list(r.missing) for r in open_runs},
        "against_the_rest": against,
        "certificate_days": round(days, 1),
        "fingerprint": authority.authority_fingerprint(federation),
        "audit": "whole" if checked.bad is None else f"line {checked.bad.n} {checked.bad.why}",
    }
    lines = [
        f"{plain['name']}: the server {'runs' if pid else 'does not run'} "
        f"({settings.listen}); its certificate lasts {days:.0f} days.",
        *authority.ending(federation),
        *put_back,
        f"{plain['sites']} sites; studies: {', '.join(names) or 'none'}.",
        *(_stands(federation, r) for r in open_runs),
        *(f"{r.id}: {text}" for r in open_runs for text in against[r.id]),
        f"Audit log: {plain['audit']}.",
        "Next: medfl-server sites, runs or log"
        if pid
        else f"Next: medfl-server start --folder {folder}",
    ]
    _show(plain, lines, as_json)


@app.command()
def sites(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """List hospitals: enrolled, invited or revoked, and when each was last heard.

    Example: medfl-server sites --folder ~/fed
    """
    from medfl.common.kept import load_record
    from medfl.server.gateway import Said

    federation, _ = _opened(folder)
    now, plain = federation.clock(), []
    for record in federation.sites():
        said = load_record(federation.state / "reports" / f"{record.name}.json", Said)
        plain.append(
            {
                "site": record.name,
                "status": record.status,
                "heard_s": None if said is None else round(now - said.at),
                "certificate_days": round((record.ends - now) / 86400, 1),
                "signing_key": record.signing_key,
            }
        )
    known = {row["site"] for row in plain}
    for made in federation.invitations():
        if not made.request and not made.cancelled and made.expires > now:
            again = " again" if made.site in known else ""
            plain.append({"site": made.site, "status": f"invited{again}", "heard_s": None})
    lines = [_site_line(row) for row in plain] or ["No hospital yet."]
    lines.append("Next: medfl-server invite SITE, or medfl-server study publish STUDY.toml")
    _show({"sites": plain}, lines, as_json)


def _site_line(row: dict[str, Any]) -> str:
    heard = "never heard" if row["heard_s"] is None else f"heard {row['heard_s']} s ago"
    days = row.get("certificate_days")
    ends = "" if days is None else f", certificate for {days:.0f} days"
    return f"{row['site']:20} {row['status']:10} {heard}{ends}"


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The hospital to shut out.")],
    why: Annotated[str, typer.Option(help="Kept in the audit log.")] = "",
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Shut a hospital out; its next call is refused, also in a running server.

    Example: medfl-server revoke st-marys --why "stolen laptop" --folder ~/fed
    """
    from medfl.server import authority

    federation, _ = _opened(folder)
    done = authority.revoke(federation, site, why)
    text = f"{site} is shut out." if done else f"{site} was shut out before."
    _show(
        {"site": site, "revoked": True, "changed": done},
        [text, f"Next, if it is to come back: medfl-server invite {site} --folder {folder}"],
        as_json,
    )


@app.command()
def renew(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Give the gateway a new key and certificate; a running server takes them up by itself.

    Hospitals renew their own. Needed only where the server was off until its certificate expired.

    Example: medfl-server renew --folder ~/fed
    """
    from medfl.common import certificates
    from medfl.server import authority

    federation, settings = _opened(folder)
    made = authority.renew_gateway(federation, settings)
    federation.record("gateway renewed", certificate=certificates.digest_of(made))
    days = (certificates.ends_at(made) - federation.clock()) / 86400
    lines = [f"Renewed for {days:.0f} days.", f"Next: medfl-server status --folder {folder}"]
    _show({"certificate_days": round(days)}, lines, as_json)


@app.command()
def log(
    folder: Folder = HERE,
    last: Annotated[int, typer.Option(min=1, help="So many lines.")] = 20,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain and the sites' signatures.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the audit log's last lines, or check all of it; exit code 7 where a line is bad.

    Example: medfl-server log --verify --folder ~/fed
    """
    from medfl.server import heads

    federation, _ = _opened(folder)
    if not verify:
        everything = list(federation.audit.lines())[-last:]
        told = [f"{e['n']:5} {e['at']} {e['what']} {_about(e['about'])}" for e in everything]
        _show({"lines": everything}, [*told, "Next: medfl-server log --verify"], as_json)
        return
    from medfl.common.errors import StorageError

    checked = heads.check(federation)
    if checked.bad is not None:
        raise StorageError(f"audit.jsonl: line {checked.bad.n} {checked.bad.why}")
    told = [f"Whole: {checked.lines} lines, {checked.heads} heads countersigned by sites."]
    if checked.doubtful:
        told.append(f"{checked.doubtful} countersignatures are of keys that are no longer known.")
    plain = {"lines": checked.lines, "heads": checked.heads, "doubtful": checked.doubtful}
    _show(plain, told, as_json)


@app.command()
def stop(
    run: Annotated[str | None, typer.Argument(help="A run; none: the server itself.")] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Measure the model on test cases; ends it for good.")
    ] = False,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Stop a run after its present round, or the server of this folder.

    A stopped run can go on, so its test cases stay unread; with --test they are read, and it is
    done.

    Example: medfl-server stop lung-20270115-080000-ab12 --folder ~/fed
    """
    from medfl.common.errors import ConfigError
    from medfl.server import runs, service

    if test and run is None:
        raise ConfigError("--test: name the run whose model is to be measured")
    federation, _ = _opened(folder)
    if run is not None:
        changed = runs.finish(federation, run) if test else runs.stop(federation, run)
        text = f"{run} is over already."
        if changed and test:
            text = (
                f"{run} trains no further after its present round; the hospitals measure its model "
                "on test cases, and it is done."
            )
        elif changed:
            text = (
                f"{run} ends after its present round, with the model and the report of its rounds "
                f"and what they spent. To go on later: medfl-server resume {run}"
            )
        _show({"run": run, "changed": changed}, [text], as_json)
        return
    pid = service.running_pid(federation)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
    text = "The server does not run." if pid is None else "The server ends within half a minute."
    _show({"stopped": pid is not None}, [text], as_json)


def _opened(folder: Path) -> tuple[Federation, Any]:
    from medfl.server.settings import load_settings, open_federation

    return open_federation(folder), load_settings(folder)


def _against_the_rest(federation: Federation, run: Run) -> list[str]:
    """Hospitals whose updates pull against the others' so far."""
    from medfl.common import study_text
    from medfl.server import runs, studies

    published = [p for p in studies.ever_published(federation) if p.digest == run.digest]
    if run.state != "running" or not published:
        return []
    from medfl.server.report.updates import against_so_far  # draws figures elsewhere: slow

    strategy = study_text.from_text(published[0].study).federation.strategy
    return against_so_far(runs.progress(federation, run.id), strategy)


def _stands(federation: Federation, run: Run) -> str:
    from medfl.server import runs
    from medfl.server.records import slowest

    named = "; ".join(run.missing)
    without = "waits for" if run.state == "waiting" else "without"
    why = runs.queued_behind(federation, run) or (named and f"{without} {named}")
    done = runs.progress(federation, run.id)
    if run.state == "running" and done and (waited := slowest(done[-1])):
        why = f"{why}; {waited}" if why else waited
    return f"{run.id}: {run.state}, round {run.round} of {run.rounds}{why and f' ({why})'}"


def _about(about: dict[str, Any]) -> str:
    return " ".join(f"{key}={str(value)[:40]}" for key, value in about.items())


def _show(plain: Any, lines: list[str], as_json: bool) -> None:
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))


# After the others: --help lists commands in the order in which they were added.
add_run_commands(app)
app.command("plan-without")(plan_without)
app.command()(report)
add_operation_commands(app)

if __name__ == "__main__":
    raise SystemExit(main())
