"""Figures of a classification or a risk: who was confused, ROC, and whether chances are honest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from medfl.common.metrics.outcomes import outcomes
from medfl.common.metrics.scores import Scores
from medfl.common.study import Task
from medfl.server.report.plot import (
    BLUE,
    DASHES,
    GREY,
    INK,
    SERIES,
    only_grid,
    short,
    svg,
    whole_numbers,
)
from medfl.server.report.words import SMALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
BINS = 10
# More classes than this make a matrix or a bundle of ROC curves unreadable on a page.
MAX_MATRIX, MAX_CURVES = 15, 8


def confusion(task: Task, scores: Scores) -> NDArray[np.int64]:
    """(C, C) counts, rows the truth, columns what the model said."""
    truth = scores.columns["target"].astype(np.int64)
    said = _said(task, scores)
    matrix = np.zeros((len(task.classes), len(task.classes)), dtype=np.int64)
    np.add.at(matrix, (truth, said), 1)
    return matrix


def roc(truth: NDArray[np.bool_], probability: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates from (0, 0) to (1, 1); tied probabilities move together.

    truth, probability: (N,). Empty where only one class is present (Fawcett 2006, algorithm 1).
    """
    positives = int(truth.sum())
    if positives in (0, len(truth)):
        return np.zeros(0), np.zeros(0)
    order = np.argsort(-probability, kind="stable")
    hits, ranked = truth[order], probability[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    true_rate = np.cumsum(hits)[last] / positives
    false_rate = np.cumsum(~hits)[last] / (len(truth) - positives)
    return np.append(0.0, false_rate), np.append(0.0, true_rate)


def reliability(hit: NDArray[np.bool_], stated: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Mean stated chance, observed share and cases of each non-empty of 10 equal bins.

    hit, stated: (N,): whether it came true, and the chance that the model gave.
    """
    index = np.minimum((stated * BINS).astype(np.int64), BINS - 1)
    cases = np.bincount(index, minlength=BINS)
    used = cases > 0
    mean = np.bincount(index, stated, BINS)[used] / cases[used]
    share = np.bincount(index, hit.astype(np.float64), BINS)[used] / cases[used]
    return mean, share, cases[used]


def wide(task: Task) -> bool:
    """Whether the confusion matrix takes the whole column for its labels."""
    return len(task.classes) > 2 or max(map(len, task.classes)) > 14


def confusion_figure(task: Task, scores: Scores) -> Markup | None:
    """The confusion matrix with counts and row shares; None for multi-label or too many classes."""
    if task.multi_label or len(task.classes) > MAX_MATRIX or not len(scores):
        return None
    matrix = confusion(task, scores)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # Rows with a cell of few patients show shares alone; the others would give it away.
    few = np.any((matrix > 0) & (matrix < SMALL), axis=1, keepdims=True)[:, 0]
    many = wide(task)
    size = (7.2, 1.2 + 0.42 * len(task.classes)) if many else (3.6, 3.3)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1.15, aspect="auto", interpolation="none")
        for (i, j), n in np.ndenumerate(matrix):
            color = "white" if share[i, j] > 0.55 else INK
            number = "" if few[i] else f"{n:,}\n"
            axes.text(j, i, f"{number}{100 * share[i, j]:.0f} %", ha="center", va="center",
                      color=color, fontsize=9 if len(task.classes) < 8 else 6.5)  # fmt: skip
        places = range(len(task.classes))
        turn = 90 if len(task.classes) > 8 else 20 if len(task.classes) > 3 else 0
        names = [short(name) for name in task.classes]
        axes.set_xticks(places, names, rotation=turn)
        axes.set_yticks(places, names)
        axes.set_xlabel("The model said")
        axes.set_ylabel("The truth")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    rows = "; ".join(
        f"{100 * share[i, i]:.0f} % of {name} were recognised"
        if few[i]
        else f"of {matrix[i].sum()} {name}, {matrix[i, i]} were recognised"
        for i, name in enumerate(task.classes)
    )
    return svg("confusion", size, f"Confusion matrix over all test cases: {rows}.",
               draw)  # fmt: skip


def roc_figure(task: Task, ways: Mapping[str, Scores]) -> Markup | None:
    """ROC over all test cases: each way of training (binary), or each class of the first way."""
    curves = _curves(task, ways)
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=GREY, lw=0.9, ls=":")
        for number, (name, (x, y)) in enumerate(curves.items()):
            color, dash = SERIES[number % len(SERIES)], DASHES[number // len(SERIES) + number % 3]
            keep = np.unique(np.linspace(0, len(x) - 1, 240).astype(np.int64))
            axes.plot(x[keep], y[keep], color=color, ls=dash, lw=1.8, label=short(name))
        axes.set_xlabel("False positive rate (1 − specificity)")
        axes.set_ylabel("True positive rate (sensitivity)")
        axes.set_xlim(-0.01, 1)
        axes.set_ylim(0, 1.01)
        axes.set_aspect("equal")
        axes.grid(visible=True)
        axes.legend(loc="lower right")

    names = ", ".join(curves)
    return svg("roc", (3.6, 3.5), f"ROC curves over all test cases: {names}.", draw)


def _curves(task: Task, ways: Mapping[str, Scores]) -> dict[str, tuple[Floats, Floats]]:
    found: dict[str, tuple[Floats, Floats]] = {}
    for way, scores in ways.items():
        each = outcomes(task, scores)
        single = each.truth.shape[1] == 1
        for k in range(min(each.truth.shape[1], MAX_CURVES)):
            x, y = roc(each.truth[:, k], each.probability[:, k])
            if len(x):
                found[way if single else task.classes[k]] = (x, y)
        if not single:
            break
    return found


def reliability_figure(task: Task, scores: Scores) -> Markup | None:
    """Stated chance against what came true, with the number of cases below."""
    if not len(scores):
        return None
    hit, stated, what = _stated(task, scores)
    mean, share, cases = reliability(hit, stated)

    def draw(figure: Figure) -> None:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color=GREY, lw=0.9, ls=":")
        top.plot(mean, share, "o-", color=BLUE, lw=1.6, ms=4.5)
        top.set_ylabel("Came true")
        top.set_ylim(-0.02, 1.02)
        top.grid(visible=True)
        below.bar(mean, cases, width=0.06, color=BLUE, alpha=0.75)
        below.set_ylabel("Cases")
        whole_numbers(below, "y")
        below.set_xlabel(what)
        below.set_xlim(-0.02, 1.02)
        only_grid(below)

    gap = float(np.average(np.abs(mean - share), weights=cases))
    alt = (
        f"Reliability over all test cases: stated chances and observed shares differ by {gap:.3f} "
        "on average (expected calibration error, 10 bins)."
    )
    return svg("reliability", (3.6, 3.5), alt, draw)


def separation_figure(task: Task, scores: Scores) -> Markup | None:
    """Stated chances by the truth, where there are two classes."""
    if task.multi_label or len(task.classes) != 2 or not len(scores):
        return None
    each = outcomes(task, scores)
    truth, stated = each.truth[:, 0], each.probability[:, 0]
    parts = {task.classes[0]: stated[~truth], task.classes[1]: stated[truth]}

    def draw(figure: Figure) -> None:
        rows = figure.subplots(2, 1, sharex=True, sharey=True)
        for axes, (name, part), color in zip(rows, parts.items(), SERIES, strict=False):
            axes.hist(part, bins=20, range=(0, 1), color=color, alpha=0.85, edgecolor="white",
                      lw=0.6)  # fmt: skip
            axes.axvline(0.5, color=INK, lw=0.9, ls=":")
            axes.set_title(f"Truly {short(name)}", color=color)
            axes.set_ylabel("Cases")
            whole_numbers(axes, "y")
            only_grid(axes)
        rows[1].set_xlabel(f"Stated chance of {short(task.classes[1])} (dotted: .5)")

    medians = "; ".join(
        f"truly {name}: median {np.median(part):.2f}" for name, part in parts.items() if len(part)
    )
    alt = f"Stated chance of {task.classes[1]} over all test cases. {medians}."
    return svg("separation", (3.6, 3.3), alt, draw)


def _stated(task: Task, scores: Scores) -> tuple[NDArray[np.bool_], Floats, str]:
    each = outcomes(task, scores)
    if task.multi_label:
        return each.truth.ravel(), each.probability.ravel(), "Stated chance, all labels"
    if not each.one_of_many:
        what = f"Stated chance of {short(task.classes[1])}"
        return each.truth[:, 0], each.probability[:, 0], what
    rows: Sequence[int] | NDArray[np.int64] = np.arange(len(scores))
    said = _said(task, scores)
    return each.truth[rows, said], each.probability[rows, said], "Stated chance of the chosen class"


def _said(task: Task, scores: Scores) -> NDArray[np.int64]:
    each = outcomes(task, scores)
    if each.one_of_many:
        return np.asarray(each.probability.argmax(axis=1), dtype=np.int64)
    return each.predicted[:, 0].astype(np.int64)
