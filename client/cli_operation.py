"""medfl-client's commands for who operates the machine: two users, backups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medfl.client.cli_federation import HOME, SITE, AsJson, SiteFile, State
from medfl.common import cli

NETWORK = Path("/var/lib/medfl-net")
SOCKET = Path("/run/medfl-line/line.sock")

Socket = Annotated[Path, typer.Option("--socket", help="Where the two sides meet.")]


def add_operation_commands(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (divide, line, backup, restore):
        app.command()(command)
    app.command("accept-log")(accept_log)


def divide(
    state: State = HOME,
    network: Annotated[Path, typer.Option(help="The network side's new folder.")] = NETWORK,
    network_user: Annotated[
        str, typer.Option("--network-user", help="The user that will own it.")
    ] = "medfl-net",
    socket: Socket = SOCKET,
    as_json: AsJson = False,
) -> None:
    """Divide an enrolled hospital into two users: one with the data, one with the network.

    Root runs it once. The network side gets the TLS key and nothing else; images, signing key,
    approvals, ledger and log stay with the owner of the state folder, who needs no network then.

    Example: medfl-client divide --state /var/lib/medfl-data --network-user medfl-net
    """
    from medfl.client import network as sides
    from medfl.client.premises import Home

    made = sides.divide(Home(state.expanduser()), network, network_user, socket.absolute())
    plain = {"site": made.site, "network": str(network), "socket": str(socket)}
    lines = [
        f"{made.site} is divided: {network_user} holds the line, in {network}.",
        f"Next, as {network_user}: medfl-client line --state {network} --peer DATA-USER",
    ]
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))


def line(
    peer: Annotated[str, typer.Option(help="The data side's user, by name or number.")],
    state: Annotated[Path, typer.Option("--state", help="The network side's folder.")] = NETWORK,
    socket: Socket = SOCKET,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Be the network side of a divided hospital, in the foreground, until SIGTERM or Ctrl-C.

    Example: medfl-client line --peer medfl-data
    """
    cli.log_to_stderr(verbose)
    from medfl.client import network
    from medfl.client.premises import Home

    peers = frozenset({network.user_id(peer)})
    network.serve(Home(state), socket.absolute(), peers, typer.echo)
    typer.echo("Stopped.")


def backup(
    out: Annotated[Path, typer.Argument(help="A new file; it holds keys, so keep it closed.")],
    state: State = HOME,
    site: SiteFile = SITE,
    as_json: AsJson = False,
) -> None:
    """Copy keys, approvals, log and privacy ledger into one file, while the client runs or not.

    Images and the cache are not in it. Take one after each training: an older ledger says less
    than was spent.

    Example: medfl-client backup /backup/medfl-2027-01-15.tar
    """
    from medfl.client import backup as backups
    from medfl.client.premises import Home

    made = backups.save(Home(state.expanduser()), site, out)
    ledger = made.about["ledger_lines"]
    plain = {"file": str(out), "files": len(made.files), "ledger_lines": int(ledger)}
    lines = [
        f"Wrote {out}: {len(made.files)} files, {ledger} lines of the ledger.",
        "It holds the hospital's keys: keep it encrypted, and elsewhere.",
    ]
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))


def restore(
    file: Annotated[Path, typer.Argument(help="What `medfl-client backup` wrote.")],
    state: State = HOME,
    site: SiteFile = SITE,
    as_json: AsJson = False,
) -> None:
    """Put a backup back into a new state folder, and the rest where site.toml says.

    A ledger or key that is still there is newer and stays. The coordinator refuses a log that is
    shorter than it was: that is meant, see the text that follows.

    Example: medfl-client restore /backup/medfl-2027-01-15.tar --state /var/lib/medfl-data/state
    """
    from medfl.client import backup as backups

    done = backups.restore(file, state.expanduser(), site)
    plain = {
        "site": done.manifest.about["site"],
        "files": len(done.manifest.files),
        "log_lines": done.lines,
        "kept": [str(p) for p in done.kept],
    }
    lines = [
        f"Restored {plain['site']}: {plain['files']} files, {done.lines} lines of the log.",
        *(f"{p}: is there already and was left as it is." for p in done.kept),
        "What was spent of privacy after the backup may be missing in the ledger. The coordinator",
        "refuses this hospital if its log was longer; telephone, then there: medfl-server",
        "accept-log SITE. With a private study that was running, ask for a budget to match first.",
        "Next: medfl-client audit verify, medfl-client start",
    ]
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))


def accept_log(state: State = HOME) -> None:
    """Go on although an audit log, the coordinator's or this hospital's, was put back.

    Telephone first: without this word nothing goes on. That it was said stays in the log.

    Example: medfl-client accept-log
    """
    from medfl.client import witness
    from medfl.client.premises import Home

    found = witness.accept(Home(state.expanduser()))
    typer.echo(
        f"Accepted: the log of {found.whose} had {found.had} lines. Next: medfl-client start"
    )
