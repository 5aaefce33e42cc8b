"""`python -m medfl.simulations.benchmarks NAME`: measure medfl and its rivals in one run.

`... compare OLD.json NEW.json` says what became worse (`medfl.simulations.benchmarks.compare`).

A benchmark is a file with `rows(small) -> list[Row]` and a line in `BENCHMARKS`.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from medfl.common import cli
from medfl.common.errors import ConfigError
from medfl.simulations.benchmarks import compare
from medfl.simulations.benchmarks.rows import Row, machine, write

# name -> (module, what it measures)
BENCHMARKS = {
    "aggregate": (
        "medfl.simulations.benchmarks.aggregate",
        "seconds an update, and memory, of 100 updates of 100 MB streamed through the strategies",
    ),
    "data": (
        "medfl.simulations.benchmarks.data",
        "cached epochs against data in memory, the first reading of DICOM against decoding, memory",
    ),
    "dp": (
        "medfl.simulations.benchmarks.dp",
        "time and memory of a private step over a plain one, against Opacus and torch.func",
    ),
    "latency": (
        "medfl.simulations.benchmarks.latency",
        "seconds of a round beyond training, 30 kB and 100 MB models, against stock Flower",
    ),
    "memory": (
        "medfl.simulations.benchmarks.memory",
        "the coordinator's peak memory at 4 and 32 hospitals with a 100 MB model",
    ),
    "scale": (
        "medfl.simulations.benchmarks.scale",
        "what 10 to 100 light hospitals cost the coordinator, and calls a second of a SuperLink",
    ),
    "secagg": (
        "medfl.simulations.benchmarks.secagg",
        "a round under masks against a plain one, 10 M parameters at 10 and 100 hospitals",
    ),
    "stacked": (
        "medfl.simulations.benchmarks.stacked",
        "training of small sites one after another against all at once by stacked parameters",
    ),
    "wire": (
        "medfl.simulations.benchmarks.wire",
        "bytes of an update and the model's worth, float32 to int4 (data: MEDFL_BENCH_DATA)",
    ),
    "simulation": (
        "medfl.simulations.benchmarks.simulation",
        "seconds of medfl-simulate, against the plain loop in two processes, Flower and FLARE",
    ),
}

app = cli.new_app()


@app.command()
def measure(
    names: Annotated[
        list[str], typer.Argument(help=f"Of {', '.join(BENCHMARKS)}; or all.", metavar="NAME...")
    ],
    small: Annotated[
        bool, typer.Option("--small", help="Small sizes: does it run, do the results agree?")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for a dated file a benchmark.")] = None,
) -> None:
    """Measure, alternating medfl with its rivals, and compare the results.

    Example: python -m medfl.simulations.benchmarks latency --out simulations/benchmarks/results

    What became worse: python -m medfl.simulations.benchmarks compare OLD.json NEW.json
    """
    unknown = sorted(set(names) - set(BENCHMARKS) - {"all"})
    if unknown:
        raise ConfigError(f"{unknown[0]}: is no benchmark; write all, or {', '.join(BENCHMARKS)}")
    # So that what was started is ended also when this is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = list(BENCHMARKS) if "all" in names else list(dict.fromkeys(names))
    told = {name: _measured(name, small) for name in wanted}
    if out is not None:
        date = time.strftime("%Y-%m-%d", time.gmtime())
        for name, rows in told.items():
            write(out / f"{date}-{name}.json", name, date, rows)
    if as_json:
        plain = {name: [row.plain() for row in rows] for name, rows in told.items()}
        typer.echo(json.dumps({"machine": machine(), "rows": plain}))
    else:
        for rows in told.values():
            for row in rows:
                typer.echo(str(row))
    if any(row.agree is False for rows in told.values() for row in rows):
        raise typer.Exit(1)


def _measured(name: str, small: bool) -> list[Row]:
    module, what = BENCHMARKS[name]
    typer.echo(f"{name}: {what}", err=True)
    rows: list[Row] = importlib.import_module(module).rows(small)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1: results differ; else as in `medfl.common.errors`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        return compare.main(words[1:])
    return cli.run(app, words, "medfl benchmarks")


if __name__ == "__main__":
    raise SystemExit(main())
