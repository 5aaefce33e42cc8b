"""Progress that a person watches: a line a run on a terminal, a line a round in a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from medfl.server.rounds import RoundRecord

# The first of these that a study reports is shown.
_SHOWN = ("dice", "auroc", "balanced_accuracy", "accuracy")


class LiveProgress:
    """Rounds of several runs at once. Written to stderr: stdout is for results."""

    def __init__(self, rounds: Mapping[str, int], console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._rounds = dict(rounds)
        self._tasks = {
            run: self._progress.add_task(run, total=total, note="preparing")
            for run, total in rounds.items()
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, record: RoundRecord) -> None:
        """One round has ended."""
        total = self._rounds[record.run]
        done = min(record.round, total) if record.trained else record.round - 1
        text = note(record)
        if self._console.is_terminal:
            end = total if record.trained else done  # which a rule may have brought forward
            self._progress.update(self._tasks[record.run], completed=done, total=end, note=text)
        else:
            what = f"round {done}/{total}" if record.trained else "the last model"
            self._console.print(
                f"{record.run}: {what}, {record.seconds:.1f} s, {text}",
                highlight=False,
                soft_wrap=True,
            )


def note(record: RoundRecord) -> str:
    """What is worth saying of a round in a few words."""
    words = [
        f"{name} {record.metrics[name]:.3f} on validation"
        for name in _SHOWN
        if record.metrics.get(name) is not None
    ][:1]
    if record.loss is not None:
        words.append(f"loss {record.loss:.3f}")
    epsilons: Sequence[float] = [s["epsilon"] for s in record.sites if s["epsilon"] is not None]
    if epsilons:
        words.append(f"ε ≤ {max(epsilons):.2f}")
    if record.void:
        words.append("void: too few sites")
    elif record.left_out:
        words.append(f"{len(record.left_out)} left out")
    return ", ".join(words)
