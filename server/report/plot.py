"""From a matplotlib figure to an inline SVG that needs no style attribute and no other file.

A page under the policy `style-src 'sha256-…'` drops every style attribute, and matplotlib writes
all its colours so; here they become presentation attributes, which no policy touches.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup, escape

from medfl.common import tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for all common kinds of colour blindness; those below
# 3:1 contrast on white are left out. Lines also differ in dash.
BLUE, VERMILION, GREEN, PURPLE, INK, GREY = (
    "#0072b2",
    "#d55e00",
    "#00815f",
    "#a8508a",
    "#26313c",
    "#8a949e",
)
Dash = str | tuple[float, tuple[float, ...]]
SERIES = (BLUE, VERMILION, GREEN, PURPLE, INK)
DASHES: Sequence[Dash] = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.", ":")
# Beyond this many hospitals a figure shows the spread and its ends, not every hospital.
MANY = 30

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medfl",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": "#9aa4ae",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#56616c",
    "ytick.color": "#56616c",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "path.simplify": True,
}


def svg(name: str, size: tuple[float, float], alt: str, draw: Callable[[Figure], None]) -> Markup:
    """Draw on a fresh figure and return it as inline SVG.

    name: unique on the page; prefixes the ids inside. size: inches. alt: read aloud instead.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    # Safe: matplotlib escapes every text that it writes, and `alt` is escaped in `inline`.
    return Markup(inline(out.getvalue(), name, alt))


def save(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Draw on a fresh figure and write it as a file; the same drawing is the same file."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    tensors.write_atomic(path, out.getvalue())


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def inline(source: str, name: str, alt: str) -> str:
    """A standalone SVG as an element of an HTML page: no prolog, style, namespace or loose ids."""
    source = source[source.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', source)
    body = source[source.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", lambda tag: _tidy(tag[0], name), body)
    body = re.sub(r">\s+<", "><", body)
    view = box.group(1) if box else "0 0 100 100"
    return (
        f'<svg class="plot" viewBox="{view}" role="img" aria-label="{escape(alt)}" '
        f'stroke-linejoin="round">{body}'
    )


def _tidy(tag: str, name: str) -> str:
    """One tag, apart from the texts between tags, which stay as they are."""
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    tag = tag.replace("xlink:href=", "href=")
    tag = re.sub(r' style="([^"]*)"', _as_attributes, tag)
    # A tenth of a point is finer than any screen.
    return re.sub(r' (d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0]), tag)


def _as_attributes(found: re.Match[str]) -> str:
    """` style="fill: none; stroke: #fff"` -> ` fill="none" stroke="#fff"`, without fonts."""
    pairs = [part.split(":", 1) for part in found.group(1).split(";") if ":" in part]
    kept = [(key.strip(), value.strip()) for key, value in pairs]
    return "".join(f' {k}="{v}"' for k, v in dict(kept).items() if k != "font-family")


def short(text: str, most: int = 24) -> str:
    """A label that leaves room for the figure; the tables have it whole."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


def whole_numbers(axes: Axes, along: Literal["x", "y"] = "x") -> None:
    """Ticks of an axis that counts: rounds, cases, hospitals."""
    from matplotlib.ticker import MaxNLocator

    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))


def only_grid(axes: Axes, along: str = "y") -> None:
    """Light lines across one axis only, and no ticks there."""
    axes.grid(axis=along, visible=True)  # type: ignore[arg-type]
    axes.tick_params(axis=along, length=0)  # type: ignore[arg-type]
