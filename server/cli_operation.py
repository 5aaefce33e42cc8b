"""medfl-server's commands for who operates the machine: backups, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path,
    typer.Option("--folder", envvar="MEDFL_SERVER_FOLDER", help="The federation's folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HERE = Path(".")


def add_operation_commands(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (backup, restore):
        app.command()(command)
    app.command("accept-log")(accept_log)
    app.command("confirm-restore")(confirm_restore)


def backup(
    out: Annotated[Path, typer.Argument(help="A new file; it holds keys, so keep it closed.")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Copy keys, sites, studies, runs and the log into one file, while the server runs or not.

    Example: medfl-server backup /backup/fed-2027-01-15.tar --folder ~/fed
    """
    from medfl.server import backup as backups
    from medfl.server.settings import open_federation

    made = backups.save(open_federation(folder), out)
    plain = {"file": str(out), "files": len(made.files), "name": made.about["name"]}
    lines = [
        f"Wrote {out}: {len(made.files)} files of {plain['name']}.",
        "Who has it is the coordinator: keep it encrypted, and elsewhere.",
        f"To try it: medfl-server restore {out} --folder NEW-FOLDER",
    ]
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))


def restore(
    file: Annotated[Path, typer.Argument(help="What `medfl-server backup` wrote.")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Put a backup back into a new folder.

    Hospitals have countersigned the log and refuse a shorter one until they are told why.

    Example: medfl-server restore /backup/fed-2027-01-15.tar --folder /var/lib/medfl-server
    """
    from medfl.server import backup as backups

    found, federation = backups.restore(file, folder)
    active = [s.name for s in federation.sites() if s.status == "active"]
    plain = {"name": federation.name, "files": len(found.manifest.files), "sites": active}
    lines = [
        f"Restored {federation.name}: {len(found.manifest.files)} files, {len(active)} sites.",
        "Open invitations are cancelled: make new ones.",
        *backups.unconfirmed(federation),
        "Hospitals refuse the shorter log. Telephone them; there, it is accepted with:",
        "medfl-client accept-log",
        f"Next: medfl-server start --folder {folder}",
    ]
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))


def confirm_restore(folder: Folder = HERE) -> None:
    """Say that sites and revocations of a restored state are right; until then `status` warns.

    Example: medfl-server confirm-restore --folder ~/fed
    """
    from medfl.server import backup as backups
    from medfl.server.settings import open_federation

    done = backups.confirm(open_federation(folder))
    typer.echo("Confirmed; the log has it." if done else "Nothing is to be confirmed here.")


def accept_log(
    site: Annotated[str, typer.Argument(help="A hospital that has restored a backup.")],
    folder: Folder = HERE,
) -> None:
    """Go on with a hospital whose log is shorter than it was. Both logs keep that it was so.

    Its privacy ledger may say less than was spent: let it show `medfl-client budget` first.

    Example: medfl-server accept-log st-marys --folder ~/fed
    """
    from medfl.server import heads
    from medfl.server.settings import open_federation

    had = heads.accept(open_federation(folder), site)
    typer.echo(f"The log of {site} may be shorter than the {had} lines that it had.")
