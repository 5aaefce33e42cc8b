"""medfl-client: what a hospital runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medfl.client.cli_check import check
from medfl.client.cli_defaults import defaults
from medfl.client.cli_federation import add_federation_commands
from medfl.client.cli_operation import add_operation_commands
from medfl.common import cli

app = cli.new_app()
add_federation_commands(app)
app.command()(check)
add_operation_commands(app)


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit codes are those of `medfl.common.errors`."""
    return cli.run(app, argv, "medfl-client", defaults)


@app.callback()
def _options(version: cli.Version = False) -> None:
    """Take part in studies without letting an image leave the hospital.

    Settings come from client.toml (in ~/.config/medfl or /etc/medfl, or where MEDFL_CLIENT_TOML
    points), then from MEDFL_STATE and MEDFL_SITE, then from flags.

    Example: medfl-client enrol coordinator.example:443 --token medfl1.st-marys.…

    Example: medfl-client check site.toml
    """


@app.command()
def budget(
    site: Annotated[
        Path, typer.Argument(envvar="MEDFL_SITE", help="The hospital's own file.")
    ] = Path("site.toml"),
    study: Annotated[
        Path | None, typer.Option(help="A study file, to say what it would cost.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cases prepared at the same time; else one a core.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Say what of the patients' privacy is spent, reserved and left, and what a study would cost.

    Ends with code 4 where the study does not fit. Nothing is sent anywhere, nothing is spent.

    Example: medfl-client budget site.toml --study study.toml
    """
    cli.log_to_stderr(verbose)
    from medfl.client import statement
    from medfl.common.errors import BudgetSpent
    from medfl.common.site import load_site

    own = load_site(site)
    said, cost = statement.statement(own), None
    if study is not None:
        from medfl.client.data.check import check_with_cohort
        from medfl.common.messages import PARTS
        from medfl.common.study import load_study

        agreed = load_study(study)
        cohort = check_with_cohort(own, agreed, n_jobs=jobs).cohort
        parts = {p: [cohort.cases[i].patient for i in cohort.positions(p)] for p in PARTS}
        cost = statement.proposed(own, agreed, parts)
    if as_json:
        typer.echo(json.dumps({**said, "proposed": cost}, indent=2))
    else:
        typer.echo("\n".join(statement.describe(said, cost)))
    if cost is not None and not cost["fits"]:
        raise typer.Exit(BudgetSpent.exit_code)


@app.command()
def exclude(
    site: Annotated[Path, typer.Argument(help="The hospital's own file (site.toml).")],
    patient: Annotated[str, typer.Argument(help="The patient's number at the hospital.")],
    undo: Annotated[bool, typer.Option("--undo", help="The patient may be used again.")] = False,
) -> None:
    """Leave a patient who has withdrawn consent out of everything from now on.

    The list keeps a keyed hash and not the number. What models have learned before stays in them.

    Example: medfl-client exclude site.toml 778812
    """
    from medfl.client.data.withdrawn import change_list, list_path, load_withdrawn
    from medfl.client.deid.keys import load_secret, secret_path
    from medfl.common.site import load_site

    own = load_site(site)
    secret = load_secret(secret_path(own))
    changed = change_list(list_path(own), secret, patient, withdrawn=not undo)
    count = len(load_withdrawn(list_path(own)))
    typer.echo(f"{'Done' if changed else 'Nothing to change'}; {count} on the list.")


@app.command()
def lineage(
    site: Annotated[Path, typer.Argument(help="The hospital's own file (site.toml).")],
    patient: Annotated[str, typer.Argument(help="The patient's number at the hospital.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which rounds of which studies were trained on a patient's data.

    Example: medfl-client lineage site.toml 778812
    """
    from dataclasses import asdict

    from medfl.client.data.candidates import hashed
    from medfl.client.data.lineage import lineage_path, rounds_with
    from medfl.client.deid.keys import cases_key, load_secret, secret_path
    from medfl.common.site import load_site

    own = load_site(site)
    key = cases_key(load_secret(secret_path(own)))
    used = rounds_with(lineage_path(own), hashed(key, "patient", patient.strip()))
    if as_json:
        typer.echo(json.dumps([asdict(u) for u in used], indent=2))
    elif not used:
        typer.echo("No round was trained on this patient's data.")
    for u in () if as_json else used:
        typer.echo(f"study {u.study} run {u.run} round {u.round} cohort {u.cohort}")


@app.command()
def deid(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with DICOM images.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the copies.")],
    site: Annotated[
        Path | None, typer.Option(help="site.toml, for its [deid] options and its key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: counts, no names.")] = False,
    look: Annotated[
        bool, typer.Option("--look/--no-look", help="Warn of writing in the pictures.")
    ] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Write de-identified copies of images: PS3.15 Annex E, Basic Profile, with the site's options.

    DIR is only read. Without --site the Basic Profile with shifted dates is applied, and the key of
    the pseudonyms lies in the user's state folder. Text in the pictures is not removed: images that
    may hold some are left out or named. Exit code 3: nothing could be passed on.

    Example: medfl-client deid /archive/export /data/deidentified --site site.toml
    """
    cli.log_to_stderr(verbose)
    from medfl.client.data.withdrawn import list_path, load_withdrawn
    from medfl.client.deid.folder import deidentify_folder, describe
    from medfl.client.deid.keys import load_secret, secret_path, user_secret_path
    from medfl.common.site import Deid, load_site

    own = load_site(site) if site is not None else None
    options = own.deid if own is not None else Deid()
    secret = load_secret(secret_path(own) if own is not None else user_secret_path())
    withdrawn = load_withdrawn(list_path(own)) if own is not None else frozenset()
    summary = deidentify_folder(source, out, options, secret, look=look, withdrawn=withdrawn)
    if as_json:
        typer.echo(json.dumps(summary.to_plain(), indent=2))
    else:
        typer.echo("\n".join(describe(summary)))


if __name__ == "__main__":
    raise SystemExit(main())
