"""What a benchmark ends with: rows of medians, with their spread, as text and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medfl.common.tensors import write_atomic


@dataclass(frozen=True, slots=True)
class Spread:
    """Measured values of one thing, smallest first."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sorted."""
        return cls(tuple(sorted(values)))

    @property
    def median(self) -> float:
        """Of the values."""
        return float(statistics.median(self.values))

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.values[0]:.3g} to {self.values[-1]:.3g})"


@dataclass(frozen=True, slots=True)
class Row:
    """One work, done by medfl and by its rivals in the same run.

    limit: what nobody can beat, or may exceed (the table says which); None where there is none.
    agree: whether all ended with the same result, None where there is nothing to compare.
    """

    work: str
    medfl: Spread
    rivals: Mapping[str, Spread]
    unit: str
    limit: float | None = None
    agree: bool | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """Each rival's median over medfl's."""
        return {name: rival.median / self.medfl.median for name, rival in self.rivals.items()}

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        told = asdict(self)
        told["medfl"] = _plain(self.medfl)
        told["rivals"] = {name: _plain(rival) for name, rival in self.rivals.items()}
        return told | {"ratios": self.ratios}

    def __str__(self) -> str:
        parts = [f"{self.work}: medfl {self.medfl} {self.unit}"]
        for name, rival in self.rivals.items():
            parts.append(f"{name} {rival} ({self.ratios[name]:.3g} x)")
        if self.limit is not None:
            parts.append(f"limit {self.limit:.3g}")
        if self.agree is not None:
            parts.append("results agree" if self.agree else "RESULTS DIFFER")
        return "; ".join(parts)


def _plain(spread: Spread) -> dict[str, Any]:
    return {"median": spread.median, "values": list(spread.values)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * size / 2**30, 1),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("medfl", "flwr", "torch", "numpy")},
    }


def write(path: Path, name: str, date: str, rows: Sequence[Row]) -> None:
    """A dated file of a whole run. Raises StorageError."""
    told = {
        "benchmark": name,
        "date": date,
        "machine": machine(),
        "rows": [row.plain() for row in rows],
    }
    write_atomic(path, (json.dumps(told, indent=1) + "\n").encode())
