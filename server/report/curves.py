"""Figures over sites and over rounds: who reached what, and how it got there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from medfl.server.report import words
from medfl.server.report.plot import (
    BLUE,
    DASHES,
    GREY,
    INK,
    MANY,
    SERIES,
    VERMILION,
    only_grid,
    short,
    svg,
    whole_numbers,
)
from medfl.server.report.run import Outcome, Round, Run, SiteResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A site's values by round, in rounds of training behind the model; None where not reported.
Lines = Mapping[str, Sequence[tuple[int, float]]]
# Title, the mean of a round, the sites' own lines, and rounds of training done minus the round.
Panel = tuple[str, Callable[[Round], float | None], Lines, int]


def forest(run: Run, metric: str) -> Markup:
    """Each hospital's metric with its interval, federated against alone, best at the top.

    Beyond 30 hospitals: the best and the worst ten.
    """
    sites = ranked(run.federated, metric)
    shown = sites if len(sites) <= MANY else [*sites[:10], *sites[-10:]]
    local = words.by_name(run.baselines["local"].sites) if "local" in run.baselines else {}
    gap = 10 if len(shown) < len(sites) else None
    label = words.measure(metric).label

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, site in enumerate(shown):
            y = -(row + (gap is not None and row >= gap))
            _whisker(axes, site, metric, y + 0.16 * bool(local), BLUE, "o")
            if site.name in local:
                _whisker(axes, local[site.name], metric, y - 0.16, VERMILION, "D")
        places = [-(row + (gap is not None and row >= gap)) for row in range(len(shown))]
        axes.set_yticks(places, [short(site.name, 36) for site in shown])
        axes.set_ylim(min(places) - 0.6, 0.6)
        if gap is not None:
            axes.text(0.5, -gap, f"… {len(sites) - len(shown)} hospitals between …",
                      ha="center", va="center", color="#56616c", fontsize=8.5,
                      transform=axes.get_yaxis_transform())  # fmt: skip
        only_grid(axes, "x")
        axes.set_xlabel(label)
        _legend(axes, bool(local))

    lines = "" if run.between_hospitals else " with 95 % intervals"
    alt = f"{label} of each hospital{lines}; the numbers are in the table by hospital."
    rows = len(shown) + (gap is not None)
    return svg("forest", (7.2, 1.1 + 0.34 * max(rows, 2)), alt, draw)


def _legend(axes: Axes, with_local: bool) -> None:
    handles = [axes.plot([], [], "o-", color=BLUE, ms=5, label="Federated model")[0]]
    if with_local:
        handles += axes.plot([], [], "D-", color=VERMILION, ms=4.5, label="Trained alone")
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderpad=0)


def _whisker(axes: Axes, site: SiteResult, metric: str, y: float, color: str, marker: str) -> None:
    number = site.metrics.get(metric)
    if number is None or not words.shows_metrics(site, metric):
        return
    pair = site.intervals.get(metric)
    if pair is not None:
        axes.plot(pair, [y, y], color=color, lw=1.8, alpha=0.75, solid_capstyle="round")
    axes.plot([number], [y], marker, color=color, ms=5.5 if marker == "o" else 4.5)


def ranked(outcome: Outcome, metric: str) -> list[SiteResult]:
    """Hospitals whose metric may be shown, best first; ties by name."""
    sign = -1 if words.measure(metric).larger_is_better else 1
    known = [(s.metrics.get(metric), s) for s in outcome.sites if words.shows_metrics(s, metric)]
    return [
        s for v, s in sorted(((v, s) for v, s in known if v is not None),
                             key=lambda pair: (sign * pair[0], pair[1].name))
    ]  # fmt: skip


def spread(run: Run, metric: str) -> Markup:
    """Histogram of the metric over many hospitals, federated against alone."""
    ways = {"Federated model": run.federated}
    if "local" in run.baselines:
        ways["Trained alone"] = run.baselines["local"]
    numbers = {
        name: [v for s in way.sites if (v := s.metrics.get(metric)) is not None]
        for name, way in ways.items()
    }
    every = [v for part in numbers.values() for v in part]
    edges = np.histogram_bin_edges(every or [0.0, 1.0], bins=24)
    label = words.measure(metric).label

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(numbers), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (name, part), color in zip(rows, numbers.items(), SERIES, strict=False):
            axes.hist(part, bins=edges, color=color, alpha=0.85, edgecolor="white", lw=0.6)
            if part:
                axes.axvline(float(np.median(part)), color=INK, lw=1.2, ls=(0, (4, 2)))
            axes.set_title(name, color=color)
            axes.set_ylabel("Hospitals")
            whole_numbers(axes, "y")
            only_grid(axes)
        rows[-1].set_xlabel(f"{label} (dashed: the middle hospital)")

    alt = "; ".join(
        f"{name}: median {words.value(metric, float(np.median(part)))}, "
        f"from {words.value(metric, min(part))} to {words.value(metric, max(part))}"
        for name, part in numbers.items() if part
    )  # fmt: skip
    alt = f"{label} over {len(run.federated.sites)} hospitals. {alt}."
    return svg("spread", (7.2, 1.5 + 1.4 * (len(numbers) - 1) + 0.4), alt, draw)


def over_rounds(run: Run, metric: str | None) -> Markup | None:
    """Validation metric and training loss by rounds of training; None without any."""
    panels: list[Panel] = []
    if metric is not None:
        lines = _lines(run, lambda r: {n: m.get(metric) for n, m in r.site_metrics.items()})
        label = f"{words.measure(metric).label} on validation cases"
        panels.append((label, lambda r: r.metrics.get(metric), lines, -1))
    losses = _lines(run, lambda r: r.site_loss, offset=0)
    panels.append(("Training loss", lambda r: r.loss, losses, 0))
    panels = [p for p in panels if any(p[1](r) is not None for r in run.rounds)]
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        drawn = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(drawn, panels, strict=True):
            _panel(axes, run, panel)
        # Above both: within a panel it would lie on somebody's line.
        named = {text: line for a in drawn for line, text in zip(*a.get_legend_handles_labels(),
                                                                 strict=True)}  # fmt: skip
        figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=4)

    return svg("rounds", (7.2, 3.2), _course(run, panels), draw)


def _panel(axes: Axes, run: Run, panel: Panel) -> None:
    title, pick, lines, offset = panel
    _background(axes, lines)
    names = ["main", *sorted({r.run for r in run.rounds} - {"main"})]
    for number, name in enumerate(names):
        color = SERIES[number % len(SERIES)]
        # Every curve is told apart: where colours come again, they come with another dash.
        dash = DASHES[(number + number // len(SERIES)) % len(DASHES)]
        points = [(r.number + offset, v) for r in run.rounds if r.run == name
                  and (v := pick(r)) is not None]  # fmt: skip
        if points:
            label = "Federated model" if name == "main" else short(words.way(name))
            axes.plot(*zip(*points, strict=True), color=color, ls=dash, lw=2, label=label)
    chosen = run.facts.get("selected_round")
    if isinstance(chosen, int) and any(r.run == "main" for r in run.rounds):
        axes.axvline(chosen, color=INK, lw=0.9, ls=":", zorder=1)
    axes.set_title(title)
    axes.set_xlabel("Rounds of training")
    whole_numbers(axes)
    only_grid(axes)


def _background(axes: Axes, lines: Lines) -> None:
    """Thin lines a hospital, or beyond 30 the band that holds 80 % of them."""
    if len(lines) <= MANY:
        for points in lines.values():
            axes.plot(*zip(*points, strict=True), color=BLUE, lw=0.7, alpha=0.4)
        return
    by_round: dict[int, list[float]] = {}
    for points in lines.values():
        for x, y in points:
            by_round.setdefault(x, []).append(y)
    xs = sorted(by_round)
    low, high = (np.array([np.percentile(by_round[x], q) for x in xs]) for q in (10, 90))
    axes.fill_between(xs, low, high, color=BLUE, alpha=0.18, lw=0, label="80 % of hospitals")


def _lines(
    run: Run, pick: Callable[[Round], Mapping[str, float | None]], offset: int = -1
) -> Lines:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.rounds:
        for name, number in pick(line).items() if line.run == "main" else ():
            if number is not None:
                found.setdefault(name, []).append((line.number + offset, number))
    return found


def _course(run: Run, panels: Sequence[Panel]) -> str:
    parts = []
    for title, pick, *_ in panels:
        numbers = [v for r in run.rounds if r.run == "main" and (v := pick(r)) is not None]
        if numbers:
            parts.append(f"{title}: from {numbers[0]:.3f} to {numbers[-1]:.3f}")
    n = run.facts.get("ended_after") or run.facts.get("rounds")
    return f"Course over {n} rounds. {'; '.join(parts)}."


def epsilon_over_rounds(run: Run) -> Markup | None:
    """Privacy loss spent by each hospital after each round; None where no line reports it."""
    # The record after the last round judges a model and trains none.
    most = run.study.federation.rounds  # older files do not say which line trained
    rounds = tuple(r for r in run.rounds if r.trained and r.number <= most)
    lines = _lines(replace(run, rounds=rounds), lambda r: r.site_epsilon, offset=0)
    if not lines:
        return None
    named = len(lines) <= 5

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if not named:
            _background(axes, lines)
            worst = max(lines.values(), key=lambda points: points[-1][1])
            axes.plot(*zip(*worst, strict=True), color=BLUE, lw=2, label="Largest")
        for (name, points), color, dash in zip(
            lines.items() if named else (), SERIES, DASHES, strict=False
        ):
            axes.plot(*zip(*points, strict=True), color=color, ls=dash, lw=1.8, label=short(name))
        if run.study.privacy is not None:
            axes.axhline(run.study.privacy.epsilon, color=GREY, lw=1, ls=(0, (6, 3)),
                         label="Allowed by the study")  # fmt: skip
        axes.set_xlabel("Round")
        axes.set_ylabel("ε spent")
        axes.set_ylim(bottom=0)
        whole_numbers(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        only_grid(axes)

    last = max(points[-1][1] for points in lines.values())
    alt = f"Privacy loss ε by round; the largest ends at {words.epsilon(last)}."
    return svg("epsilon", (7.2, 2.6), alt, draw)
