"""Write the lock files, with the hashes of every file that may be installed, and the list of parts.

    python deploy/lock.py           what is installed beside this Python (`make lock`, afresh)
    python deploy/lock.py --keep    the versions that the lock files have; new pins get their hashes

requirements.lock: everything that `[project] dependencies` need, and what those need, but torch.
requirements-torch.lock: torch by its version alone, because each kind of machine has a build of its
    own from another place (`deploy/install-torch.sh`); local version suffixes are dropped.
requirements-dev.lock: what the optional dependencies (checks, tests, Ray) need beyond that.
deploy/requirements-lint.lock: what `make lint-deploy` needs beyond that; names are kept by hand.
sbom.cdx.json: what a hospital installs, as CycloneDX (`deploy/sbom.py`).

Hashes come from the package index, by `uv pip compile`; pip then takes no other file.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parent))  # after `python -P`, or from elsewhere
import sbom

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Written by `make lock` from pyproject.toml; do not edit by hand.\n"
RUN, TORCH, DEV = "requirements.lock", "requirements-torch.lock", "requirements-dev.lock"
LINT = "deploy/requirements-lint.lock"
HEADS = {
    RUN: HEAD
    + "# Without torch, which deploy/install-torch.sh installs: pip install --no-deps -r\n",
    TORCH: HEAD
    + "# By version alone: deploy/install-torch.sh takes the build that fits the machine.\n",
    DEV: HEAD,
    LINT: "# What `make lint-deploy` needs beyond requirements-dev.lock; names are kept by hand.\n",
}
# Only CUDA builds of torch need these; a CPU machine must not get them.
NEVER = ("nvidia-", "cuda-", "triton", "torchvision")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", re.MULTILINE)

Pins = dict[str, str]


def closure(wanted: Iterable[str]) -> Pins:
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


def chosen() -> dict[str, Pins]:
    """Pins by lock file, from what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = closure(project["dependencies"])
    extra = closure(line for group in project["optional-dependencies"].values() for line in group)
    return {
        RUN: {n: v for n, v in base.items() if n != "torch" and not n.startswith(NEVER)},
        TORCH: {"torch": base["torch"]},
        DEV: {n: v for n, v in extra.items() if n not in base and not n.startswith(NEVER)},
        LINT: kept(ROOT / LINT),
    }


def kept(file: Path) -> Pins:
    """Pins of a lock file, with or without hashes, by canonical name."""
    found = _PIN.findall(file.read_text(encoding="utf-8"))
    return {canonicalize_name(name): version for name, version in found}


def hashed(pins: Mapping[str, str]) -> str:
    """The pins as lines of a lock file, each with the hashes of all files of that version."""
    command = ["-m", "uv", "pip", "compile", "--quiet", "--no-deps", "--generate-hashes"]
    done = subprocess.run(
        [sys.executable, "-P", *command, "--no-header", "--no-annotate", "--no-config", "-"],
        input="".join(f"{name}=={version}\n" for name, version in sorted(pins.items())),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def main() -> int:
    """Write all files and say how many pins each holds."""
    keep = "--keep" in sys.argv[1:]
    locks = {file: kept(ROOT / file) for file in HEADS} if keep else chosen()
    locks[RUN].pop("torch", None)
    for file, pins in locks.items():
        plain = "".join(f"{name}=={version}\n" for name, version in pins.items())
        text = plain if file == TORCH else hashed(pins)
        (ROOT / file).write_text(HEADS[file] + text, encoding="utf-8")
        print(f"{file}: {len(pins)} pins")
    (ROOT / sbom.FILE).write_text(sbom.text_of(locks[RUN] | locks[TORCH]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
