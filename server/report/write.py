"""`write_report`: report.html and model_card.md from the files of a finished run."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfl.common.tensors import write_atomic

if TYPE_CHECKING:
    from medfl.server.report.page import Figure


def draw(folder: Path, groups: Sequence[str]) -> dict[str, list[Figure]]:
    """Some of the report's groups of figures (`medfl.server.report.page.GROUPS`)."""
    from medfl.server.report.page import figures
    from medfl.server.report.run import read_run

    run = read_run(folder)
    return {group: figures(run, group) for group in groups}


def write_report(folder: Path, drawn: Mapping[str, list[Figure]] | None = None) -> Path:
    """Write report.html and model_card.md into `folder`; returns the path of the report.

    drawn: what `draw` has made of the same folder; the rest is drawn here.

    A function of the folder's files alone: the same files give the same bytes, so it can be
    repeated at any time.

    Raises:
        StorageError: the folder is not that of a finished run, a file in it is damaged, or the
            disk refused.
        ConfigError: its study.toml has faults.
    """
    from medfl.server.report.card import card_context
    from medfl.server.report.page import context
    from medfl.server.report.run import read_run

    run = read_run(folder)
    page = context(run, drawn)
    card = card_context(run, page)
    report = folder / "report.html"
    write_atomic(report, render_page(page).encode())
    write_atomic(folder / "model_card.md", _render("model_card.md.j2", card, html=False).encode())
    return report


def render_page(page: dict[str, Any]) -> str:
    """The page with its own content security policy: no scripts, nothing from anywhere else."""
    style = _source("report.css")
    sha = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{sha}'; img-src data:; base-uri 'none'"
    return _render("report.html.j2", {**page, "style": style, "policy": policy}, html=True)


def _render(template: str, values: dict[str, Any], html: bool) -> str:
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    if html:
        # Ours, from the package, without a "<": its hash in the policy needs it byte for byte.
        values = {**values, "style": Markup(values["style"])}
    environment = Environment(
        loader=DictLoader({template: _source(template)}),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": markdown_text, "yaml": json.dumps}
    return environment.get_template(template).render(values)


def markdown_text(text: str) -> str:
    """One line of plain text, with everything that Markdown or HTML would act on escaped."""
    flat = " ".join(str(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", flat)


def _source(name: str) -> str:
    return files("medfl.server.report").joinpath(name).read_text(encoding="utf-8")
