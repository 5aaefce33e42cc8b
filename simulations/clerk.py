"""A process that writes a run's report: what that needs is imported while others import torch."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Self

from medfl.common.errors import FederationError, MedflError
from medfl.simulations.pool import Pool

# What a report of figures imports, most of a second altogether.
_NEEDED = (
    *("matplotlib.figure", "matplotlib.backends.backend_svg", "jinja2", "markupsafe"),
    *("medfl.server.report.page", "medfl.server.report.card", "medfl.server.report.run"),
)


class Clerk:
    """Begin before torch is imported: the clerk is forked from what is there."""

    def __init__(self) -> None:
        self._pool = Pool(_write, 1, _prepare)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.close()

    def report(self, folder: Path) -> None:
        """Write report.html and model_card.md of a finished run. Raises as `write_report`."""
        from medfl.server.report import write_report

        try:
            done = self._pool.submit(os.fsencode(folder.absolute())).result()
        except FederationError:  # the clerk has died
            done = b""
        if not done:
            write_report(folder)  # whatever is wrong is told here


def _prepare() -> None:
    for name in _NEEDED:
        importlib.import_module(name)


def _write(folder: bytes) -> bytes:
    from medfl.server.report import write_report

    try:
        return os.fsencode(write_report(Path(os.fsdecode(folder))))
    except MedflError:
        return b""
