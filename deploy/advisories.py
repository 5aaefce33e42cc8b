"""Check the lock files against known advisories: python deploy/advisories.py [FOLDER]

FOLDER (or MEDFL_OSV): a dump of the OSV database for PyPI, one JSON file an advisory, as the Open
Source Vulnerability project publishes it; carry it over where a machine has no way out. Without one
nothing is checked, and the last line says so. Exit status 1: a pin has an advisory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lock import DEV, ROOT, RUN, TORCH, kept

Advisory = Mapping[str, Any]


def known(folder: Path) -> Iterator[Advisory]:
    """The advisories of a dump that were not withdrawn."""
    for file in sorted(folder.rglob("*.json")):
        plain = json.loads(file.read_text(encoding="utf-8"))
        if not plain.get("withdrawn"):
            yield plain


def hits(pins: Mapping[str, str], advisories: Iterable[Advisory]) -> Iterator[str]:
    """One line for each pin and advisory that fit."""
    for advisory in advisories:
        for affected in advisory.get("affected", ()):
            package = affected.get("package", {})
            name = canonicalize_name(str(package.get("name", "")))
            if package.get("ecosystem") == "PyPI" and name in pins:
                if is_affected(pins[name], affected):
                    said = advisory.get("summary") or "; ".join(advisory.get("aliases", ()))
                    yield f"{name}=={pins[name]}: {advisory['id']} {said}".rstrip()


def is_affected(version: str, affected: Mapping[str, Any]) -> bool:
    """OSV schema, "Evaluation": in `versions`, or within a range of the ecosystem's order."""
    if version in affected.get("versions", ()):
        return True
    ranges = (r for r in affected.get("ranges", ()) if r.get("type") == "ECOSYSTEM")
    return any(_within(Version(version), r.get("events", ())) for r in ranges)


def _within(version: Version, events: Iterable[Mapping[str, str]]) -> bool:
    inside = False
    for at, what in sorted((_at(text), what) for event in events for what, text in event.items()):
        if what == "introduced" and version >= at:
            inside = True
        if (what == "fixed" and version >= at) or (what == "last_affected" and version > at):
            inside = False
    return inside


def _at(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:  # "0" is one; anything else that is none affects whatever comes after
        return Version("0")


def main() -> int:
    """Check what is named; say what was found."""
    place = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MEDFL_OSV", "")
    if not place or not Path(place).is_dir():
        print(f"advisories: not checked, there is no database at {place or 'MEDFL_OSV'}")
        return 0
    pins = {name: v for file in (RUN, TORCH, DEV) for name, v in kept(ROOT / file).items()}
    advisories = list(known(Path(place)))
    found = sorted(set(hits(pins, advisories)))
    print(
        "\n".join([*found, f"advisories: {len(found)} for {len(pins)} pins of {len(advisories)}"])
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
