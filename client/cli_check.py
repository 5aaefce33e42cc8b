"""medfl-client check: the hospital's one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl.common import cli
from medfl.common.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from medfl.client.data.cases import Cohort
    from medfl.client.machine import Item
    from medfl.common.study import Study

_MARKS = {"green": "ok", "warning": "LOOK", "red": "MEND", "note": "note"}
_WIDE = 25


def check(
    site: Annotated[
        Path, typer.Argument(envvar="MEDFL_SITE", help="The hospital's own file.")
    ] = Path("site.toml"),
    study: Annotated[
        str | None, typer.Option(help="Only the data, for this study: a file, or a name.")
    ] = None,
    state: Annotated[
        Path,
        typer.Option("--state", envvar="MEDFL_STATE", help="Folder of keys, approvals, the log."),
    ] = Path("~/.medfl"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: counts, no names.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page; with --study also pictures of patients.")
    ] = None,
    left_out: Annotated[
        Path | None,
        typer.Option(help="With --study: write the cases left out, by name, as CSV."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cases prepared at the same time; else one a core.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Say whether this hospital is ready, on one page: green, or why not and what to do.

    Checks site.toml, GPU, disk, permissions, certificate, the connection step by step, the clock,
    the records, and the data for every study that is offered. With --study only the data: which
    cases serve it, which do not and why. No file of the hospital is changed, and nothing about
    its data is sent.

    Exit code: 0 where nothing is red, else that of the first red line: 2 a file or permission, 3
    the data, 5 refused, 6 no connection or a wrong clock, 7 disk or a damaged file.

    Example: medfl-client check site.toml

    Example: medfl-client check site.toml --study study.toml --html check.html
    """
    cli.log_to_stderr(verbose)
    if study is not None:
        _check_data(site, _study(study, state), as_json, html, left_out, jobs)
        return
    if left_out is not None:
        raise ConfigError("--left-out: the cases left out are those of one study; name it: --study")
    # Imported here, so that --help stays fast.
    from medfl.client import checkup
    from medfl.client.premises import Home

    items = []
    for item in checkup.everything(Home(state.expanduser()), site, n_jobs=jobs):
        items.append(item)
        if not as_json:
            typer.echo("\n".join(_lines(item)))
    code = checkup.exit_code(items)
    if html is not None:
        from medfl.client.checkup_page import page

        _write(html, page(items))
    if as_json:
        plain = [item.to_plain() for item in items]
        typer.echo(json.dumps({"ready": code == 0, "exit_code": code, "items": plain}, indent=2))
    else:
        typer.echo(_verdict(items))
    raise typer.Exit(code)


def _lines(item: Item) -> list[str]:
    lines = [f"{_MARKS[item.state]:5}{item.topic:{_WIDE}} {item.said}"]
    told = [*item.detail.splitlines(), *([item.todo] if item.todo else [])]
    return lines + [f"{'':{_WIDE + 6}}{line}" for line in told]


def _verdict(items: list[Item]) -> str:
    red = sum(i.state == "red" for i in items)
    warned = sum(i.state == "warning" for i in items)
    more = f", {warned} to look at" if warned else ""
    return f"{red} to mend{more}." if red else f"Ready{more}. Next: medfl-client studies"


def _study(named: str, state: Path) -> Study:
    """A study's file, or a study that the coordinator has published. Raises ConfigError."""
    from medfl.common.study import load_study
    from medfl.strategies.catalogue import study_faults

    file = Path(named)
    if file.suffix != ".toml" and not file.exists():
        from medfl.client import consent
        from medfl.client.premises import Home

        home = Home(state.expanduser())
        if home.enrolment_file.exists():
            return consent.find(home, named)[1]
        raise ConfigError(
            f"--study {named}: there is no such file, and this hospital, which is not enrolled in "
            f"{home.folder}, knows no published study"
        )
    agreed = load_study(file)
    if faults := study_faults(agreed):
        raise ConfigError([f"{named}: {fault}" for fault in faults])
    return agreed


def _check_data(
    site: Path,
    agreed: Study,
    as_json: bool,
    html: Path | None,
    left_out: Path | None,
    jobs: int | None,
) -> None:
    from medfl.client.data.check import check_with_cohort, describe
    from medfl.common.site import load_site

    details = left_out is not None
    checked = check_with_cohort(load_site(site), agreed, n_jobs=jobs, details=details)
    if html is not None:
        from medfl.client.data.check_page import page

        _write(html, page(checked, agreed))
    if left_out is not None:
        _write(left_out, _as_csv(checked.cohort))
    if as_json:
        typer.echo(json.dumps(checked.result.to_plain(), indent=2))
    else:
        typer.echo("\n".join(describe(checked.result)))
    raise typer.Exit(checked.result.exit_code)


def _as_csv(cohort: Cohort) -> str:
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["case", "reason", "detail", "step"])
    writer.writerows([q.case_id, q.reason, q.detail, q.step] for q in cohort.quarantined)
    return buffer.getvalue()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}. Check the folder and the free space."
        ) from None
    # These files speak of the hospital's patients or machines.
    path.chmod(0o600)
