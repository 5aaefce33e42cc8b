"""Two processes that write a run's report: what that needs is imported while others import torch,
and half of the figures are drawn on either core."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from medfl.common.errors import FederationError, MedflError
from medfl.simulations.pool import Pool

# What a report of figures imports, most of a second altogether.
_NEEDED = (
    *("matplotlib.figure", "matplotlib.backends.backend_svg", "jinja2", "markupsafe"),
    *("medfl.server.report.page", "medfl.server.report.card", "medfl.server.report.run"),
)
# Groups of figures that take equally long to draw.
_HALVES = (("task_figures", "round_figures"), ("pictures", "site_figures"))


class Clerk:
    """Begin before torch is imported: the processes are forked from what is there."""

    def __init__(self) -> None:
        self._pool = Pool(_work, len(_HALVES), _prepare)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.close()

    def report(self, folder: Path) -> None:
        """Write report.html and model_card.md of a finished run. Raises as `write_report`."""
        from medfl.server.report import write_report

        place = str(folder.absolute())
        try:
            asked = [_packed({"folder": place, "draw": half}) for half in _HALVES]
            halves = [self._pool.submit(task) for task in asked]
            drawn: dict[str, Any] = {}
            for half in halves:
                drawn |= json.loads(half.result())
            done = self._pool.submit(_packed({"folder": place, "drawn": drawn})).result()
        except (FederationError, ValueError):  # one has died, or met an error
            done = b""
        if not done:
            write_report(folder)  # whatever is wrong is told here


def _prepare() -> None:
    for name in _NEEDED:
        importlib.import_module(name)


def _packed(task: dict[str, Any]) -> bytes:
    return json.dumps(task).encode()


def _work(task: bytes) -> bytes:
    """Draw some figures, or write the page with those drawn; nothing where there is an error."""
    from markupsafe import Markup

    from medfl.server.report.page import Figure
    from medfl.server.report.write import draw, write_report

    asked = json.loads(task)
    folder = Path(asked["folder"])
    try:
        if "draw" in asked:
            groups = draw(folder, asked["draw"])
            return _packed({g: [asdict(f) for f in found] for g, found in groups.items()})
        drawn = {
            group: [Figure(**f | {"drawing": Markup(f["drawing"])}) for f in found]
            for group, found in asked["drawn"].items()
        }
        return os.fsencode(write_report(folder, drawn))
    except MedflError:
        return b""
