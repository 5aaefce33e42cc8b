"""medfl-server report: what a run is worth, and the coordinator's signature under it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from medfl.server.cli_runs import HERE, AsJson, Folder


def report(
    run: Annotated[str, typer.Argument(help="The run.")],
    out: Annotated[
        Path | None, typer.Option(help="Copy result, report, card and signature to this folder.")
    ] = None,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Say what the model reached and where the report lies, checked against the signature.

    signed.json holds the SHA-256 of model, result, report and model card under one signature of the
    key that every hospital has pinned. Exit code 7: a file is not what the run wrote.

    Example: medfl-server report lung-20270115-080000-ab12 --out results --folder ~/fed
    """
    from dataclasses import asdict

    from medfl.common.errors import StorageError
    from medfl.server import runs
    from medfl.server.report import federated
    from medfl.server.report.lines import result_lines
    from medfl.server.report.run import read_run
    from medfl.server.settings import open_federation

    federation = open_federation(folder)
    signed = federated.opened(federation, run)
    place = runs.folder_of(federation, run)
    reached = result_lines(read_run(place))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name in (federated.RESULT, federated.REPORT, federated.CARD, federated.SIGNED):
                shutil.copyfile(place / name, out / name)
        except OSError as error:
            raise StorageError(f"{out}: cannot be written ({error.strerror})") from None
        place = out
    lines = [
        *reached,
        f"{place / federated.REPORT}  SHA-256 {signed.report}",
        f"{place / federated.CARD}  SHA-256 {signed.card}",
        f"Signed by the coordinator's key {signed.coordinator[:16]}…: {place / federated.SIGNED}",
        f"Next: open the report in a browser; medfl-server model get {run} --out model.safetensors",
    ]
    plain = {**asdict(signed), "folder": str(place)}
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))
