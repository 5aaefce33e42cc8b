"""`write_report`: report.html and model_card.md from the files of a finished run."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfl.common.tensors import write_atomic

if TYPE_CHECKING:
    from jinja2 import Template

    from medfl.server.report.page import Figure
    from medfl.server.report.run import Run

# Whether what is put in must be escaped for HTML.
_TEMPLATES = {"report.html.j2": True, "model_card.md.j2": False}


def prepare() -> None:
    """Do what every report needs, whatever the run: for a process that has time before it."""
    for template in _TEMPLATES:
        _compiled(template)


def write_report(folder: Path) -> Path:
    """Write report.html and model_card.md into `folder`; returns the path of the report.

    A function of the folder's files alone: the same files give the same bytes, so it can be
    repeated at any time.

    Raises:
        StorageError: the folder is not that of a finished run, a file in it is damaged, or the
            disk refused.
        ConfigError: its study.toml has faults.
    """
    from medfl.server.report.run import read_run

    return write(read_run(folder))


def write(run: Run, drawn: Mapping[str, list[Figure]] | None = None) -> Path:
    """`write_report` of a run that was read. drawn: groups of its figures that are there already.

    Raises:
        StorageError: a damaged file, or the disk refused.
    """
    from medfl.server.report.card import card_context
    from medfl.server.report.page import context

    page = context(run, drawn)
    card = card_context(run, page)
    report = run.folder / "report.html"
    write_atomic(report, render_page(page).encode())
    write_atomic(run.folder / "model_card.md", _render("model_card.md.j2", card).encode())
    return report


def render_page(page: dict[str, Any]) -> str:
    """The page with its own content security policy: no scripts, nothing from anywhere else."""
    style = _source("report.css")
    sha = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{sha}'; img-src data:; base-uri 'none'"
    return _render("report.html.j2", {**page, "style": style, "policy": policy})


def _render(template: str, values: dict[str, Any]) -> str:
    from markupsafe import Markup

    if _TEMPLATES[template]:
        # Ours, from the package, without a "<": its hash in the policy needs it byte for byte.
        values = {**values, "style": Markup(values["style"])}
    return _compiled(template).render(values)


@cache
def _compiled(template: str) -> Template:
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(
        loader=DictLoader({template: _source(template)}),
        autoescape=_TEMPLATES[template],
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": markdown_text, "yaml": json.dumps}
    return environment.get_template(template)


def markdown_text(text: str) -> str:
    """One line of plain text, with everything that Markdown or HTML would act on escaped."""
    flat = " ".join(str(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", flat)


def _source(name: str) -> str:
    return files("medfl.server.report").joinpath(name).read_text(encoding="utf-8")
