"""Render the Helm chart with Go's own template engine, without Helm, and check what comes out.

Usage: python deploy/render_chart.py [KEY=VALUE ...]    prints the manifests

What Helm does beyond that (hooks, `lookup`, `include`, notes, releases) is not done, and the chart
uses none of it. A value that values.yaml does not have is an error here; Helm would pass over it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from go_template import render

CHART = Path(__file__).resolve().parent / "helm" / "medfl"
KUBERNETES = "1.31"


def manifests(changes: dict[str, Any], release: str = "trial") -> list[dict[str, Any]]:
    """The objects of the chart. changes: of values, by dotted key.

    Raises:
        ValueError: a template cannot be rendered.
    """
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for key, value in changes.items():
        *way, last = key.split(".")
        table = values
        for step in way:
            table = table[step]
        if last not in table:
            raise ValueError(f"{key}: values.yaml has no such key")
        table[last] = value
    context = {"Values": values, "Release": {"Name": release, "Namespace": "medfl"}}
    shared = (CHART / "templates" / "_pod.tpl").read_text()
    found = []
    for file in sorted((CHART / "templates").glob("*.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / file.name
            whole.write_text(shared + file.read_text())
            text = render(whole, context).decode()
        if text.startswith("render template failed"):
            raise ValueError(text)
        found += [one for one in yaml.safe_load_all(text) if one]
    return found


def check(found: list[dict[str, Any]]) -> None:
    """Raises kubernetes_validate.ValidationError: an object is not what Kubernetes knows."""
    for one in found:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def main() -> int:
    """Print what would be applied."""
    changes = {k: yaml.safe_load(v) for k, _, v in (a.partition("=") for a in sys.argv[1:])}
    found = manifests(changes)
    check(found)
    print(yaml.safe_dump_all(found, sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
