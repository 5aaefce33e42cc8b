"""The check-up as a page: one file, nothing loaded from elsewhere, nothing that must not leave."""

from __future__ import annotations

from importlib.resources import files

from medfl.client.machine import Item

WORDS = {"green": "ok", "warning": "look", "red": "mend", "note": "note"}


def page(items: list[Item]) -> str:
    """HTML of all lines, without the details that only the hospital's own screen shows."""
    from jinja2 import Environment, StrictUndefined

    text = files("medfl.client").joinpath("checkup_page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(text).render(
        items=items,
        words=WORDS,
        red=sum(i.state == "red" for i in items),
        warned=sum(i.state == "warning" for i in items),
    )
