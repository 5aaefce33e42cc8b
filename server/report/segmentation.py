"""Figures of a segmentation, and the pictures of good and bad cases for every image study."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from medfl.common.errors import StorageError
from medfl.common.metrics.scores import DICE, Scores
from medfl.common.pictures import upright
from medfl.common.study import Task
from medfl.server.report import words
from medfl.server.report.plot import MANY, SERIES, only_grid, short, svg, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# On grey pictures both stay visible and apart for the colour-blind; the model's line is dashed.
TRUTH, MODEL = "#56b4e9", "#ffb000"
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Example:
    """One test case as a picture.

    image: (H, W) uint8. target, prediction: (H, W) class maps, or class indices of the case.
    score: Dice, or the chance that the model gave to the truth.
    """

    site: str
    image: NDArray[np.uint8]
    target: NDArray[Any]
    prediction: NDArray[Any]
    score: float


def read_examples(path: Path, site: str, orientation: str | None = None) -> list[Example]:
    """Read a site's examples.npz; slices of a volume are turned as radiologists see them.

    orientation: of the volume that the slices come from, such as RAS; None for pictures.

    Raises:
        StorageError: damaged, or holding pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = [file[name] for name in ("image", "target", "prediction", "score")]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise StorageError(
            f"{path}: is not a whole file of examples ({error}). Remove it and repeat the report"
        ) from None
    return [
        Example(
            site=site,
            image=upright(image, orientation),
            target=upright(target, orientation),
            prediction=upright(said, orientation),
            score=float(score),
        )
        for image, target, said, score in zip(*parts, strict=True)
        if np.isfinite(score)
    ]


def best_and_worst(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Up to four each, no case in both, at most as many a site as it takes to fill the row."""
    order = sorted(examples, key=lambda e: (-e.score, e.site))
    half = min(SHOWN, len(order) // 2)
    best = _varied(order, half) if half else order[:SHOWN]
    chosen = {id(e) for e in best}
    rest = [e for e in reversed(order) if id(e) not in chosen]
    return best, _varied(rest, half)


def _varied(order: Sequence[Example], n: int) -> list[Example]:
    """The first `n`, but one of each site before a second of any."""
    seen: dict[str, int] = {}
    ranks = []
    for place, example in enumerate(order):
        seen[example.site] = seen.get(example.site, 0) + 1
        ranks.append((seen[example.site], place))
    chosen = sorted(sorted(range(len(order)), key=lambda i: ranks[i])[:n])
    return [order[i] for i in chosen]


def pictures(name: str, task: Task, examples: Sequence[Example]) -> Markup | None:
    """A row of cases: outlines of truth and model, or what the model said against the truth."""
    if not examples:
        return None

    def draw(figure: Figure) -> None:
        for axes, example in zip(
            figure.subplots(1, SHOWN, squeeze=False)[0][: len(examples)], examples, strict=True
        ):
            _picture(axes, task, example)
        for axes in figure.axes:
            axes.set_axis_off()

    told = "; ".join(f"{e.site}: {_told(task, e)}" for e in examples)
    alt = f"{len(examples)} test cases with the truth and what the model said. {told}."
    tallest = max(e.image.shape[0] / e.image.shape[1] for e in examples)
    return svg(name, (7.2, 0.5 + 1.65 * min(tallest, 1.6)), alt, draw)


def _picture(axes: Axes, task: Task, example: Example) -> None:
    axes.imshow(example.image, cmap="gray", vmin=0, vmax=255, interpolation="none")
    if example.target.ndim == 2:
        for mask, color, dash, width in (
            (example.target, TRUTH, "solid", 1.5),
            (example.prediction, MODEL, "dashed", 1.3),
        ):
            for k in range(1, len(task.classes)):
                if (mask == k).any():
                    inside = (mask == k).astype(np.float64)
                    axes.contour(inside, [0.5], colors=[color], linestyles=dash,
                                 linewidths=width)  # fmt: skip
    told, site, chance = _told(task, example), short(example.site), f"{example.score:.2f}"
    # A segmentation's line ends in its Dice; a class needs the line, its chance joins the site.
    text = f"{told}\n{site}" if example.target.size > 1 else f"{short(told, 28)}\n{site}, {chance}"
    axes.set_title(text, fontsize=8, fontweight="normal")


def _told(task: Task, example: Example) -> str:
    if example.target.ndim == 2:
        return f"Dice {words.value(DICE, example.score)}"
    if example.target.size > 1:
        return f"chance of the truth {example.score:.2f}"
    truth, said = (_class(task, int(v.item())) for v in (example.target, example.prediction))
    return truth if truth == said else f"{truth}, said {said}"


def _class(task: Task, index: int) -> str:
    return task.classes[index] if 0 <= index < len(task.classes) else str(index)


def dice_figure(task: Task, scores: Mapping[str, Scores]) -> Markup | None:
    """Dice of the test cases: a box a hospital and class; beyond 30 hospitals one over all cases.

    Hospitals with fewer than five test cases are left out: a box would give the count away.
    """
    names = [
        c for c in task.classes[1:] if any(f"{DICE}/{c}" in s.columns for s in scores.values())
    ]
    shown = {site: s for site, s in scores.items() if len(s) >= words.SMALL}
    if not names or not any(len(s) for s in scores.values()):
        return None
    if len(scores) > MANY or not shown:
        return _dice_histogram(names, scores)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, name in enumerate(names):
            places = [i + (number - (len(names) - 1) / 2) * 0.8 / len(names)
                      for i in range(len(shown))]  # fmt: skip
            color = SERIES[number % len(SERIES)]
            values = [_finite(s.columns[f"{DICE}/{name}"]) for s in shown.values()]
            axes.boxplot(
                values, positions=places, widths=0.62 / len(names), patch_artist=True,
                boxprops={"facecolor": color + "40", "edgecolor": color}, whis=(5, 95),
                medianprops={"color": color, "linewidth": 2}, whiskerprops={"color": color},
                capprops={"color": color}, showfliers=False,
            )  # fmt: skip
            axes.plot([], [], "s", color=color, ms=7, label=short(name))
        turn = 90 if len(shown) > 8 else 0
        axes.set_xticks(range(len(shown)), [short(site) for site in shown], rotation=turn)
        axes.set_ylim(top=1.0)
        axes.set_ylabel("Dice")
        only_grid(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, borderpad=0)

    medians = "; ".join(f"{site}: {_median(names, s)}" for site, s in shown.items())
    return svg("dice", (7.2, 3.0), f"Dice of the test cases, median by hospital. {medians}.", draw)


def _dice_histogram(names: Sequence[str], scores: Mapping[str, Scores]) -> Markup:
    values = {
        n: _finite(np.concatenate([s.columns[f"{DICE}/{n}"] for s in scores.values()]))
        for n in names
    }

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (name, part), color in zip(values.items(), SERIES, strict=False):
            axes.hist(part, bins=40, range=(0, 1), histtype="step", lw=1.8, color=color,
                      label=short(name))  # fmt: skip
        axes.set_xlabel("Dice")
        axes.set_ylabel("Test cases")
        axes.set_xlim(0, 1)
        whole_numbers(axes, "y")
        only_grid(axes)
        axes.legend(loc="upper left")

    medians = "; ".join(f"{n}: median {np.median(v):.3f}" for n, v in values.items() if len(v))
    return svg("dice", (7.2, 2.6), f"Dice over all test cases. {medians}.", draw)


def _finite(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(values[np.isfinite(values)], dtype=np.float64)


def _median(names: Sequence[str], scores: Scores) -> str:
    parts = [(n, _finite(scores.columns[f"{DICE}/{n}"])) for n in names]
    return ", ".join(f"{n} {np.median(v):.3f}" for n, v in parts if len(v))
