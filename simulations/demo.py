"""The demonstration: three hospitals as files, their data checked, three studies trained."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medfl.client.data.check import CheckResult, check_with_cohort
from medfl.client.data.check_page import page
from medfl.common.site import load_site
from medfl.common.study import load_study
from medfl.simulations.cli import make_room, simulate, summary_text
from medfl.simulations.hospitals import make_hospitals

STUDIES = Path(__file__).parent / "studies"


@dataclass(frozen=True, slots=True)
class Part:
    """One study of the demonstration, the hospitals' folder that it uses, and what it compares."""

    study: Path
    hospitals: str
    compare: tuple[str, ...]


PARTS = (
    Part(STUDIES / "demo_segmentation.toml", "segmentation", ("local", "pooled")),
    Part(STUDIES / "demo_classification.toml", "classification", ("local", "pooled")),
    Part(STUDIES / "demo_risk.toml", "risk", ("local", "pooled", "no_privacy")),
)


def run_demo(out: Path, *, seed: int = 42, small: bool = False) -> list[Path]:
    """Make hospitals below `out`, check them, train all studies; returns the runs' folders.

    small: fewer cases and rounds, for tests.

    Raises:
        MedflError: what keeps a study from running, as in `medfl-simulate run`.
    """
    say = Console(stderr=True, highlight=False)
    hospitals = out / "demo-hospitals"
    if hospitals.exists():
        shutil.rmtree(hospitals)  # made by an earlier demonstration, and made again the same
    say.rule("1. Three hospitals, as files")
    make_hospitals(hospitals, small=small)
    say.print(f"DICOM, NIfTI, tables and a site.toml each, below {hospitals}", soft_wrap=True)
    say.rule("2. Each hospital checks its data")
    for part in PARTS:
        _check_all(part, hospitals, say)
    folders = []
    for number, part in enumerate(PARTS, start=3):
        file = _shorter(part.study, out) if small else part.study
        study = load_study(file)
        say.rule(f"{number}. {study.title}")
        folder = out / study.name
        make_room(folder)
        result = simulate(
            study,
            file,
            data=hospitals / part.hospitals,
            out=folder,
            seed=seed,
            workers=None,
            compare=list(part.compare),
            device="auto",
            cache=None,
        )
        say.print(summary_text(result, folder), soft_wrap=True)
        folders.append(folder)
    say.rule("Now")
    say.print(_next_steps(folders, hospitals), soft_wrap=True)
    return folders


def _shorter(study: Path, out: Path) -> Path:
    """A copy of the study with two rounds of two steps; returns its path."""
    text = re.sub(r"(?m)^(rounds|local_steps) = [0-9]+", r"\1 = 2", study.read_text("utf-8"))
    file = out / study.name
    file.write_text(text, encoding="utf-8")
    return file


def _check_all(part: Part, hospitals: Path, say: Console) -> None:
    study = load_study(part.study)
    table = Table(title=study.title, title_justify="left")
    for heading in ("hospital", "cases used", "left out, and why", "privacy"):
        table.add_column(heading)
    for file in sorted((hospitals / part.hospitals).glob("*/site.toml")):
        site = load_site(file)
        checked = check_with_cohort(site, study)
        (file.parent / "check.html").write_text(page(checked, study), encoding="utf-8")
        privacy = "none" if site.privacy is None else f"ε ≤ {site.privacy.epsilon:g}"
        table.add_row(site.name, str(checked.result.usable), _why(checked.result), privacy)
    say.print(table)


def _why(result: CheckResult) -> str:
    reasons = [f"{part.cases} {part.reason.replace('_', ' ')}" for part in result.left_out]
    return ", ".join(reasons) or "nothing"


def _next_steps(folders: list[Path], hospitals: Path) -> str:
    reports = "\n".join(f"  {folder / 'report.html'}" for folder in folders)
    pages = "\n".join(f"  {p}" for p in sorted(hospitals.glob("*/*/check.html"))[:1])
    site = hospitals / "segmentation" / "riverside" / "site.toml"
    return (
        f"Open in a browser:\n{reports}\n{pages}\n"
        "Try next:\n"
        f"  .venv/bin/medfl-client check {site} --study {STUDIES / 'demo_segmentation.toml'}\n"
        f"  .venv/bin/medfl-simulate run {STUDIES / 'demo_segmentation.toml'} "
        f"--data {hospitals / 'segmentation'} --out runs/mine --compare fedprox,fedbn,pooled\n"
        "  Copy a study file, change it, and run it again: every key is explained in "
        "common/study.py."
    )
