"""Write requirements.lock and requirements-dev.lock from what is installed beside this Python.

Usage: python deploy/lock.py (`make lock` runs it in a fresh environment)

requirements.lock: everything that `[project] dependencies` need, and what those need.
requirements-dev.lock: what the optional dependencies (checks, tests, Ray) need beyond that.
Local version suffixes are dropped: torch==2.13.0 is satisfied by a CPU and by a CUDA build, so
that one file serves both kinds of machine.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Written by `make lock` from pyproject.toml; do not edit by hand.\n"
# Only CUDA builds of torch need these; a CPU machine must not get them.
NEVER = ("nvidia-", "cuda-", "triton", "torchvision")


def closure(wanted: Iterable[str]) -> dict[str, str]:
    """Installed version of each distribution that `wanted` needs, by canonical name.

    Raises:
        PackageNotFoundError: something wanted is not installed.
    """
    open_ends = [(canonicalize_name(r.name), frozenset(r.extras)) for r in map(Requirement, wanted)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_ends:
        name, extras = open_ends.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            asked = ({"extra": extra} for extra in ("", *extras))
            if needed.marker is None or any(needed.marker.evaluate(a) for a in asked):
                open_ends.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return {name: metadata.version(name).partition("+")[0] for name, _ in seen}


def main() -> int:
    """Write both files and say how many pins each holds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = closure(project["dependencies"])
    extra = closure(line for group in project["optional-dependencies"].values() for line in group)
    for file, pins in (
        ("requirements.lock", base),
        ("requirements-dev.lock", {n: v for n, v in extra.items() if n not in base}),
    ):
        lines = [f"{n}=={v}\n" for n, v in sorted(pins.items()) if not n.startswith(NEVER)]
        (ROOT / file).write_text(HEAD + "".join(lines), encoding="utf-8")
        print(f"{file}: {len(lines)} pins")
    return 0


if __name__ == "__main__":
    sys.exit(main())
