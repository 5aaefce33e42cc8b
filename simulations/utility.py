"""What privacy costs: one study under several epsilons and seeds, as numbers and as a figure.

Every run is that of `medfl-simulate run` with another [privacy] epsilon and delta; `none` is the
same study without privacy. Its learning rate and steps are still those that were chosen for clipped
gradients, so that it may be no good measure of what is possible: name that with --others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from medfl.common import cli
from medfl.common.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from medfl.common.study import Study

app = cli.new_app()


@dataclass(frozen=True, slots=True)
class Setting:
    """epsilon: None without privacy. delta: of this point."""

    epsilon: float | None
    delta: float

    @property
    def name(self) -> str:
        """As an axis shows it."""
        return "none" if self.epsilon is None else f"{self.epsilon:g}"


@dataclass(frozen=True, slots=True)
class Point:
    """One run. spent: largest epsilon of a site, as it was reported. mean: over the sites' test
    parts; everything: all test cases together."""

    setting: Setting
    seed: int
    spent: float | None
    mean: float
    everything: float


@app.command()
def curve(
    study: Annotated[Path, typer.Argument(help="A study file with [privacy] and [simulation].")],
    data: Annotated[Path, typer.Option(help="Folder of the public set.")],
    epsilons: Annotated[
        str, typer.Option(help="Commas between; EPSILON:DELTA for another delta; none.")
    ] = "0.1,1,3,8,none",
    seeds: Annotated[str, typer.Option(help="Commas between.")] = "42",
    metric: Annotated[str, typer.Option(help="The metric to draw.")] = "accuracy",
    others: Annotated[
        str, typer.Option(help="Values to compare with, such as 10=.7,none=.712.")
    ] = "",
    called: Annotated[str, typer.Option(help="Whose values those are.")] = "others",
    out: Annotated[Path, typer.Option(help="Folder for NAME.svg and NAME.json.")] = Path("utility"),
) -> None:
    """Run a study under each epsilon and seed; draw its metric over epsilon.

    Example: python -m medfl.simulations.utility heart_disease_dp.toml --data DIR --seeds 42,43
    """
    from medfl.common import tensors
    from medfl.common.study import load_study
    from medfl.server.report.plot import save

    loaded = load_study(study)
    settings, compared = settings_of(loaded, epsilons), values_of(others)
    points = []
    for setting in settings:
        for seed in (int(text) for text in seeds.split(",")):
            points.append(measured(loaded, data, setting, seed, metric))
            typer.echo(json.dumps(asdict(points[-1])))
    save(
        out / f"{loaded.name}.svg",
        (5.6, 3.4),
        lambda figure: draw(figure, points, metric, compared, called),
    )
    text = json.dumps([asdict(point) for point in points], indent=2)
    tensors.write_atomic(out / f"{loaded.name}.json", text.encode())


def settings_of(study: Study, text: str) -> list[Setting]:
    """`0.1:1e-4,1,none` -> settings; the study's delta where none is said. Raises ConfigError."""
    if study.privacy is None:
        raise ConfigError(f"{study.name}: has no [privacy] table, whose epsilon could be changed")
    found = []
    for part in text.split(","):
        epsilon, _, delta = part.strip().partition(":")
        try:
            number = None if epsilon == "none" else float(epsilon)
            found.append(Setting(number, float(delta or study.privacy.delta)))
        except ValueError:
            raise ConfigError(f"--epsilons {part}: write numbers, EPSILON:DELTA or none") from None
    return found


def values_of(text: str) -> dict[str, float]:
    """`0.1=.606,none=.712` -> values by the name of a setting. Raises ConfigError."""
    pairs = [part.split("=") for part in text.split(",") if part]
    try:
        return {epsilon.strip(): float(value) for epsilon, value in pairs}
    except ValueError:
        raise ConfigError("--others: write EPSILON=VALUE with commas between") from None


def measured(study: Study, data: Path, setting: Setting, seed: int, metric: str) -> Point:
    """One run, with the weights of `medfl-simulate run`; raises what that raises."""
    from medfl.common.noise import key_from
    from medfl.server.rounds import run_study
    from medfl.simulations.cli import default_cache
    from medfl.simulations.direct import Direct
    from medfl.simulations.results import summary
    from medfl.simulations.run import preload
    from medfl.simulations.sites import SimulatedRun, find_hospitals

    preload(study)
    study = with_setting(study, setting)
    hospitals = find_hospitals(study, data, default_cache())
    with TemporaryDirectory() as place:
        run = SimulatedRun("main", study, hospitals, Path(place))
        key = key_from(seed, "coordinator")
        outcome = run_study(study, Direct.of(run), seed=seed, noise_key=key)
        told = summary(run, {"main": outcome}, run, seed)
    spent = [site["epsilon"] for site in told["sites"] if site["epsilon"] is not None]
    mean, everything = told["mean"].get(metric), told["all"].get(metric)
    if mean is None or everything is None:
        raise ConfigError(f"--metric {metric}: is not measured by this study")
    return Point(setting, seed, max(spent, default=None), mean, everything)


def with_setting(study: Study, setting: Setting) -> Study:
    """The study at this epsilon and delta; without intervals, which nobody reads here."""
    study = replace(study, evaluation=replace(study.evaluation, bootstrap=0))
    if setting.epsilon is None or study.privacy is None:
        return replace(study, privacy=None)
    privacy = replace(study.privacy, epsilon=setting.epsilon, delta=setting.delta)
    return replace(study, privacy=privacy)


def means_of(points: Sequence[Point]) -> dict[str, float]:
    """Mean over the seeds by the name of a setting."""
    names = dict.fromkeys(p.setting.name for p in points)
    return {
        name: float(np.mean([p.mean for p in points if p.setting.name == name])) for name in names
    }


def draw(
    figure: Figure,
    points: Sequence[Point],
    metric: str,
    others: dict[str, float],
    called: str,
) -> None:
    """Runs as dots, their mean as a line, the settings side by side."""
    from medfl.server.report.plot import BLUE, VERMILION, only_grid

    axes, means = figure.subplots(), means_of(points)
    names = sorted({*means, *others}, key=lambda name: np.inf if name == "none" else float(name))
    axes.plot(names, [np.nan] * len(names))  # the order of the axis
    axes.plot(list(means), list(means.values()), color=BLUE, label="mean over seeds")
    axes.scatter(
        [p.setting.name for p in points], [p.mean for p in points], s=14, color=BLUE, alpha=0.35
    )
    if others:
        axes.scatter(
            list(others), list(others.values()), marker="D", s=26, color=VERMILION, label=called
        )
        axes.legend(loc="lower right")
    for name, mean in means.items():
        highest = max(p.mean for p in points if p.setting.name == name)
        axes.annotate(
            f"{mean:.3f}", (name, highest), (0, 6), textcoords="offset points", ha="center",
            color=BLUE, fontsize=8,
        )  # fmt: skip
    axes.set_xlabel("ε of a patient, over the whole study")
    axes.set_title(f"{metric.replace('_', ' ')}, mean over the hospitals' test parts")
    axes.margins(y=0.2)
    only_grid(axes)


if __name__ == "__main__":
    raise SystemExit(cli.run(app, None, "python -m medfl.simulations.utility"))
