"""A process that writes a run's report: what that needs is imported while others import torch, and
a copy of it draws half of the figures on the other core."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Self

from medfl.common.errors import FederationError, MedflError
from medfl.simulations.pool import Pool, forked

if TYPE_CHECKING:
    from medfl.server.report.page import Figure
    from medfl.server.report.run import Run

# What a report of figures imports, most of a second altogether.
_NEEDED = (
    *("matplotlib.figure", "matplotlib.backends.backend_svg", "jinja2", "markupsafe"),
    *("medfl.server.report.page", "medfl.server.report.card", "medfl.server.report.run"),
)
# Groups of figures that take equally long to draw.
_HALVES = (("task_figures", "round_figures"), ("pictures", "site_figures"))


class Clerk:
    """Begin before torch is imported: the process is forked from what is there."""

    def __init__(self) -> None:
        self._pool = Pool(_work, 1, _prepare)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.close()

    def report(self, folder: Path) -> None:
        """Write report.html and model_card.md of a finished run. Raises as `write_report`."""
        from medfl.server.report import write_report

        try:
            done = self._pool.submit(os.fsencode(folder.absolute())).result()
        except FederationError:  # it has died
            done = b""
        if not done:
            write_report(folder)  # whatever is wrong is told here


def _prepare() -> None:
    for name in _NEEDED:
        importlib.import_module(name)
    from medfl.server.report import write

    write.prepare()


def _work(task: bytes) -> bytes:
    """Write the report in the folder that is named; nothing where there is an error."""
    from medfl.server.report.page import figures
    from medfl.server.report.run import read_run
    from medfl.server.report.write import write

    try:
        run = read_run(Path(os.fsdecode(task)))
        with _copy(run) as other:
            drawn = {group: figures(run, group) for group in _HALVES[0]}
            drawn |= _unpacked(other.recv_bytes())
        return os.fsencode(write(run, drawn))
    except (MedflError, EOFError):
        return b""


@contextmanager
def _copy(run: Run) -> Iterator[Connection]:
    """A copy of this process, from which the other half of the figures comes, or nothing."""
    from medfl.server.report.page import figures

    ours, theirs = Pipe(duplex=False)

    def draw() -> None:
        theirs.send_bytes(_packed({group: figures(run, group) for group in _HALVES[1]}))

    with forked(draw):
        theirs.close()
        with ours:
            yield ours


def _packed(drawn: dict[str, list[Figure]]) -> bytes:
    return json.dumps(
        {group: [asdict(f) for f in found] for group, found in drawn.items()}
    ).encode()


def _unpacked(packed: bytes) -> dict[str, list[Figure]]:
    from markupsafe import Markup

    from medfl.server.report.page import Figure

    return {
        group: [Figure(**f | {"drawing": Markup(f["drawing"])}) for f in found]
        for group, found in json.loads(packed).items()
    }
