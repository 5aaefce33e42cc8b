"""Shared by all tests: where the public data sets lie, and folders that tests may not fill."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

import medfl  # noqa: F401  before anybody imports grpc, which reads the environment then

if TYPE_CHECKING:
    from medfl.client.hospital import Hospital
    from medfl.common.study import Study

ROOT = Path(__file__).resolve().parent.parent

# Flower asks an outside host to count its users unless told otherwise, and keeps state in the home
# folder; tests do neither. MONAI and matplotlib would write below the home folder as well.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NO_COLOR", "1")

# How long an example takes is the machine's business, which others use as well.
settings.register_profile("medfl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("medfl")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def public_data() -> Callable[[str], Path]:
    """public_data("name"): a public data set's folder or file; skips where it is not there."""
    base = Path(os.environ.get("MEDFL_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        place = base / name
        if not place.exists():
            pytest.skip(f"{name} is not there; set MEDFL_DATA to a folder that holds it")
        return place

    return find


@pytest.fixture(scope="session")
def risk_study() -> Callable[..., Study]:
    """A risk from the one number x by logistic regression; tables are changed by keyword."""
    from medfl.common import config
    from medfl.common.study import Study

    def make(**tables: dict[str, Any]) -> Study:
        raw: dict[str, Any] = {
            "name": "risk",
            "task": {"kind": "risk", "classes": ["no", "yes"]},
            "record": {"features": [{"name": "x"}], "scale": "none"},
            "model": {"name": "logistic"},
            "training": {"learning_rate": 0.5, "batch_size": 100, "local_steps": 2},
            "federation": {"rounds": 2},
            "evaluation": {"bootstrap": 0},
        }
        for name, table in tables.items():
            raw[name] = raw.get(name, {}) | table
        return config.parse(raw, Study, "study")

    return make


@pytest.fixture(scope="session")
def risk_hospital() -> Callable[..., Hospital]:
    """A hospital with these records in memory: x and label of each; the parts by name, or train."""
    import numpy as np

    from medfl.client.data.cases import Case, Cohort
    from medfl.client.hospital import Hospital

    def make(
        study: Study,
        folder: Path,
        xs: Sequence[object] = (-1.0, 1.0, 2.0),
        ys: Sequence[int] = (0, 1, 1),
        parts: Sequence[Any] = (),
        name: str = "a",
        **more: Any,
    ) -> Hospital:
        parts = parts or ["train"] * len(xs)
        cohort = Cohort(
            tuple(Case(f"{name}{i}", f"p{name}{i}", part) for i, part in enumerate(parts)),
            inputs=(),
            targets=np.array(ys, dtype=np.int64),
            records=tuple({"x": None if x is None else str(x)} for x in xs),
            digest=f"cohort of {name}",
        )
        more = {"simulated": True, **more}
        return Hospital(name, study, lambda: cohort, folder / name, **more)

    return make
