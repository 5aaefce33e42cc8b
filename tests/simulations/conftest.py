"""Small hospitals as files: tables with a site.toml each, and studies that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

STUDY = """
name = "risk"
[task]
kind = "risk"
classes = ["no", "yes"]
[record]
features = [{{ name = "x", range = [-3, 3] }}, {{ name = "y", range = [-3, 3] }}]
scale = "{scale}"
[model]
name = "logistic"
[training]
learning_rate = 0.3
batch_size = {batch_size}
local_steps = {local_steps}
[federation]
strategy = "{strategy}"
rounds = {rounds}
min_sites = {min_sites}
{federation}
[evaluation]
split = "given"
validation = 0.0
bootstrap = {bootstrap}
{evaluation}
{more}
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """A study file of two numbers x and y, changed by keyword."""

    def write(file: str = "study.toml", **changes: Any) -> Path:
        values: dict[str, Any] = {
            "scale": "federated",
            "batch_size": 4,
            "local_steps": 3,
            "strategy": "fedavg",
            "rounds": 3,
            "min_sites": 1,
            "federation": "",
            "bootstrap": 20,
            "evaluation": "",
            "more": "",
        }
        path = tmp_path / file
        path.write_text(STUDY.format(**values | changes))
        return path

    return write


@pytest.fixture
def write_hospital(tmp_path: Path) -> Callable[..., Path]:
    """hospitals/<name>: a table of `n` records, every third for the test; returns hospitals/."""

    def write(
        name: str,
        n: int = 30,
        more: str = "",
        test: bool = True,
        base: str = "hospitals",
        text: str | None = None,
    ) -> Path:
        rng = np.random.default_rng(sum(map(ord, name)))
        xy = rng.normal(size=(n, 2))
        label = (xy @ [1.5, -1.0] + rng.normal(size=n) > 0).astype(int)
        parts = ["test" if test and i % 3 == 2 else "train" for i in range(n)]
        lines = [
            f"{name}-{i},{a:.3f},{b:.3f},{'yes' if y else 'no'},{part}"
            for i, ((a, b), y, part) in enumerate(zip(xy, label, parts, strict=True))
        ]
        folder = tmp_path / base / name
        folder.mkdir(parents=True)
        table = "patient,x,y,label,split\n" + "\n".join(lines) + "\n"
        (folder / "table.csv").write_text(table if text is None else text)
        (folder / "site.toml").write_text(
            f'name = "{name}"\n[data]\nformat = "table"\npath = "table.csv"\n{more}\n'
        )
        return tmp_path / base

    return write
