"""medfl-simulate: many hospitals on one machine, by the code that hospitals run."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medfl.common import cli
from medfl.common.errors import ConfigError

if TYPE_CHECKING:
    from medfl.common.study import Study

app = cli.new_app()


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit codes are those of `medfl.common.errors`."""
    try:
        return cli.run(app, argv, "medfl-simulate")
    finally:
        if argv is None:
            # The process ends: torch's hundred thousand objects need not be looked through again.
            gc.freeze()


@app.callback()
def _options(version: cli.Version = False) -> None:
    """Train one study over many hospitals on this machine, and compare.

    Example: medfl-simulate run study.toml --data hospitals/ --out runs/first --compare local,pooled
    """


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="The study file (study.toml).")],
    data: Annotated[
        Path, typer.Option(help="Folder of the data: hospitals with a site.toml, or a public set.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results [default: runs/<study name>].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bits, on the CPU.")] = 42,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Training processes [default: one a core].")
    ] = None,
    compare: Annotated[
        str,
        typer.Option(
            help="Comma-separated: local, pooled, no_privacy, and strategies such as fedprox."
        ),
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache: Annotated[
        Path | None, typer.Option(help="Folder for prepared images [default: ~/.cache/medfl].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json to stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Train a study over all hospitals found in DATA and write models and a report to OUT.

    Example: medfl-simulate run study.toml --data hospitals/ --compare local,pooled,fedprox
    """
    cli.log_to_stderr(verbose)
    from medfl.common.study import load_study

    loaded = load_study(study)
    folder = out or Path("runs") / loaded.name
    result = simulate(
        loaded,
        study,
        data=data,
        out=folder,
        seed=seed,
        workers=workers,
        compare=[name.strip() for name in compare.split(",") if name.strip()],
        device=device,
        cache=cache,
    )
    if as_json:
        import json

        typer.echo(json.dumps(result))
    else:
        typer.echo(summary_text(result, folder))


@app.command()
def hospitals(
    folder: Annotated[Path, typer.Argument(help="A new folder for the hospitals' files.")],
    seed: Annotated[int, typer.Option(help="Same seed, same files.")] = 0,
) -> None:
    """Make three synthetic hospitals as files: DICOM, NIfTI, tables, and their everyday faults."""
    from medfl.simulations.hospitals import make_hospitals

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty; name a new folder")
    sites = make_hospitals(folder, seed=seed)
    typer.echo(f"Wrote {len(sites)} site files below {folder}.")
    typer.echo(f"Next: medfl-client check {sites[0]} --study STUDY.toml")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demonstration's results.")] = Path(
        "runs"
    ),
) -> None:
    """Three hospitals as files, their data checked, three studies trained: under 3 minutes."""
    cli.log_to_stderr(False)
    from medfl.simulations.demo import run_demo

    run_demo(out)


@app.command("demo-federation")
def demo_federation(
    out: Annotated[
        Path, typer.Option(help="Folder for the demonstration; an earlier one is replaced.")
    ] = Path("runs/demo-federation"),
) -> None:
    """One coordinator and three hospitals in this terminal, by the real commands: 4 minutes.

    Example: medfl-simulate demo-federation
    """
    cli.log_to_stderr(False)
    from medfl.simulations.demo_federation import run_demo

    run_demo(out)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
) -> None:
    """Write report.html and model_card.md of a finished run again."""
    from medfl.server.report import write_report

    typer.echo(f"Wrote {write_report(folder)}")


def simulate(
    study: Study,
    study_file: Path,
    *,
    data: Path,
    out: Path,
    seed: int,
    workers: int | None,
    compare: list[str],
    device: str,
    cache: Path | None,
) -> dict[str, Any]:
    """Run a study and its comparisons, write everything into `out`, return result.json's content.

    Raises:
        MedflError: whatever a person can do something about.
    """
    started = time.monotonic()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking must not start CUDA here
    from medfl.simulations.clerk import Clerk

    gc.disable()  # importing makes no garbage to speak of; `run_all` enables it again
    try:
        with Clerk() as clerk:
            from medfl.simulations.ahead import reading_ahead
            from medfl.simulations.progress import LiveProgress
            from medfl.simulations.results import environment, storing, write_results
            from medfl.simulations.run import Machine, choose_device, plan_runs, preload, run_all
            from medfl.simulations.sites import find_hospitals
            from medfl.strategies.catalogue import study_faults

            if faults := study_faults(study):
                raise ConfigError([f"{study_file}: {fault}" for fault in faults])
            sites = find_hospitals(study, data, cache or default_cache())
            with reading_ahead(sites, study):
                chosen = choose_device(device)
                preload(study)
            machine = Machine(device=chosen) if workers is None else Machine(workers, chosen)
            runs = plan_runs(study, sites, out, compare, chosen)
            with storing(out):
                moved = make_room(out)
                shutil.copyfile(study_file, out / "study.toml")
            how = study.federation
            typer.echo(
                f"{study.title or study.name}: {len(sites)} sites, {how.rounds} rounds of "
                f"{how.strategy}, {machine.workers} workers on {chosen}"
                + (f" (earlier results moved to {moved})" if moved else ""),
                err=True,
            )
            totals = {r.name: r.study.federation.rounds for r in runs}
            with LiveProgress(totals) as progress:
                outcomes = run_all(runs, seed=seed, machine=machine, on_round=progress.show)
            seconds = time.monotonic() - started
            result = write_results(
                runs,
                outcomes,
                seed=seed,
                seconds=seconds,
                environment=environment(chosen, machine.workers),
            )
            clerk.report(out)
    finally:
        gc.enable()
    return result


def make_room(out: Path) -> Path | None:
    """Make `out`; results of an earlier run in it are moved aside, never overwritten."""
    moved = None
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; name a folder")
    names_in = {path.name for path in out.iterdir()} if out.exists() else set()
    if names_in:
        if "rounds.jsonl" not in names_in and not names_in <= {"study.toml", "hospitals"}:
            raise ConfigError(
                f"--out {out}: holds other files than an earlier run's; name a new folder"
            )
        names = (out.with_name(f"{out.name}.previous-{n}") for n in itertools.count(1))
        moved = next(name for name in names if not name.exists())
        out.rename(moved)
    out.mkdir(parents=True, exist_ok=True)
    return moved


def default_cache() -> Path:
    """~/.cache/medfl, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medfl"


def summary_text(result: dict[str, Any], folder: Path) -> str:
    """The result in a few lines, and what to do next."""
    metrics = [n for n, v in result["all"].items() if v is not None][:4]
    rows = [("", *metrics, "")]
    for name, part in [(result["strategy"], result), *result["baselines"].items()]:
        for label in ("mean", "all"):
            values = [part[label].get(m) for m in metrics]
            texts = ["-" if v is None else f"{v:.3f}" for v in values]
            of = "mean over sites" if label == "mean" else "all test cases"
            rows.append((name, *texts, of))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"{result['seconds']:.0f} s. Open {folder / 'report.html'}")
    return "\n".join(line.rstrip() for line in lines)
