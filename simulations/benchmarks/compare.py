"""Whether a newer run of a benchmark is worse than an older one, by ratios and never by seconds.

Seconds belong to a machine and an hour; how many times faster than a rival of the same run is what
lasts. Where there is no rival, what is counted (models of memory, bytes) is compared with its
limit, and seconds are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from medfl.common import cli
from medfl.common.errors import ConfigError

# Ratios of one machine differ by so much from one run to the next.
TOLERANCE = 0.15

app = cli.new_app()


@dataclass(frozen=True, slots=True)
class Verdict:
    """One ratio of one work, larger is better; `old` or `new` is None where a run lacks it."""

    work: str
    against: str
    old: float | None
    new: float | None
    worse: bool

    def __str__(self) -> str:
        told = " -> ".join("none" if r is None else f"{r:.3g}" for r in (self.old, self.new))
        return (
            f"{'WORSE' if self.worse else 'as good'}: {self.work}, against {self.against}: {told}"
        )


def verdicts(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], tolerance: float
) -> list[Verdict]:
    """One a ratio of the old run, in its order; then results that differ in the new run.

    A ratio is worse where it fell by more than `tolerance` of itself, or is not there any more.
    """
    later = {row["work"]: row for row in new}
    found = []
    for row in old:
        ratios = dict(_ratios(later.get(row["work"], {})))
        for against, before in _ratios(row):
            now = ratios.get(against)
            worse = now is None or now < before * (1 - tolerance)
            found.append(Verdict(row["work"], against, before, now, worse))
    differ = [row["work"] for row in new if row["agree"] is False]
    return found + [Verdict(work, "equal results", None, None, True) for work in differ]


def _ratios(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if not row:
        return
    yield from row["ratios"].items()
    if not row["ratios"] and row["limit"] is not None and row["unit"] != "s":
        yield "its limit", row["limit"] / row["medfl"]["median"]


def read(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a dated file, or of what `--json` printed. Raises ConfigError."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rows = told if isinstance(told, list) else [row for own in told.values() for row in own]
        for row in rows:
            list(_ratios(row))
            row["agree"], row["work"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: holds no rows of a benchmark; write its file's name") from None
    return list(rows)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A file of --out, or what --json printed.")],
    new: Annotated[Path, typer.Argument(help="The same of a later run.")],
    tolerance: Annotated[
        float, typer.Option(help="A ratio may fall by this share of itself.", min=0.0, max=1.0)
    ] = TOLERANCE,
) -> None:
    """Say which ratios are worse in NEW than in OLD; exit code 1 if one is.

    Example: python -m medfl.simulations.benchmarks compare old.json new.json
    """
    found = verdicts(read(old), read(new), tolerance)
    if not found:
        raise ConfigError(f"{old}: has no ratio to be compared")
    for verdict in found:
        typer.echo(str(verdict))
    if any(verdict.worse for verdict in found):
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1: something is worse; else as in `medfl.common.errors`."""
    return cli.run(app, argv, "medfl benchmarks compare")
