"""Shared by all tests: where the public data sets lie, and folders that tests may not fill."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import medfl  # noqa: F401  before anybody imports grpc, which reads the environment then

ROOT = Path(__file__).resolve().parent.parent

# Flower asks an outside host to count its users unless told otherwise, and keeps state in the home
# folder; tests do neither. MONAI and matplotlib would write below the home folder as well.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NO_COLOR", "1")


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
