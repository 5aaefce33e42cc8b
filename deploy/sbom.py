"""The software that a hospital installs, as a CycloneDX 1.6 list of parts (sbom.cdx.json).

Versions come from the lock files, licences and who needs whom from what is installed. The same
locks give the same bytes: no date, and a serial number that follows from the content.
"""

from __future__ import annotations

import json
import tomllib
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = "sbom.cdx.json"
ROOT = Path(__file__).resolve().parent.parent


def text_of(pins: Mapping[str, str]) -> str:
    """The list of medfl and these pins, as JSON."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = _component(project["name"], project["version"], "application")
    own["licenses"] = [{"expression": project["license"]}]
    parts = [_component(n, v, "library") | _licence(n) for n, v in sorted(pins.items())]
    refs = {part["name"]: part["bom-ref"] for part in parts}
    needed = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    plain: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": parts,
        "dependencies": [
            _needs(own["bom-ref"], needed, refs),
            *(_needs(refs[n], _needed_by(n), refs) for n in sorted(pins)),
        ],
    }
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(plain, sort_keys=True))
    return json.dumps({"serialNumber": f"urn:uuid:{number}", **plain}, indent=1) + "\n"


def _component(name: str, version: str, kind: str) -> dict[str, Any]:
    """`purl` as in the package-url specification for the type pypi."""
    purl = f"pkg:pypi/{canonicalize_name(name)}@{version}"
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _licence(name: str) -> dict[str, Any]:
    """What the distribution says of its licence; nothing where it is not installed here."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return {}
    if expression := about.get("License-Expression"):
        return {"licenses": [{"expression": expression}]}
    classified = [
        line.rpartition(" :: ")[2]
        for line in about.get_all("Classifier") or []
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    short = [line for line in [about.get("License") or ""] if 0 < len(line) < 80]
    return {"licenses": [{"license": {"name": text}} for text in (classified or short)]}


def _needed_by(name: str) -> set[str]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return set()
    needed = map(Requirement, lines)
    return {
        canonicalize_name(r.name)
        for r in needed
        if r.marker is None or r.marker.evaluate({"extra": ""})
    }


def _needs(ref: str, names: set[str], refs: Mapping[str, str]) -> dict[str, Any]:
    return {"ref": ref, "dependsOn": sorted(refs[n] for n in names if n in refs)}
