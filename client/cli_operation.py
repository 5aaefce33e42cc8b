"""medfl-client's commands for who operates the machine: two users, backups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medfl.client.cli_federation import HOME, AsJson, State
from medfl.common import cli

NETWORK = Path("/var/lib/medfl-net")
SOCKET = Path("/run/medfl-line/line.sock")

Socket = Annotated[Path, typer.Option("--socket", help="Where the two sides meet.")]


def add_operation_commands(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (divide, line):
        app.command()(command)


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
