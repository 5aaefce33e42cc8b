"""The report and the model card, rendered from run folders made of random numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medfl.common.errors import StorageError
from medfl.common.metrics import (
    Scores,
    concatenate,
    default_metrics,
    intervals,
    load,
    mean_over_sites,
    score_classification,
    summarise,
)
from medfl.common.study import Study, load_study
from medfl.server.report import words, write_report

STUDY = """
name = "made-up"
title = {title}
purpose = "Random numbers in the shape of a study."
[task]
kind = "{kind}"
classes = {classes}
[image]
dimensions = 2
size = [64, 64]
[model]
name = "{model}"
[training]
local_epochs = 1
[federation]
rounds = 12
{privacy}
"""
SEGMENTATION = '["background", "anterior", "posterior"]'


@dataclass(frozen=True)
class Made:
    """What to make. n_test: of the first hospital, others near it."""

    kind: str = "classification"
    classes: str = '["normal", "pneumonia"]'
    title: str = "Pneumonia on chest radiographs"
    sites: int = 3
    n_test: int = 90
    private: bool = False
    baselines: bool = True


def make_run(folder: Path, made: Made, seed: int = 3) -> dict[str, Any]:
    """Write a finished run's folder from random scores; returns result.json's content."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = "unet" if made.kind == "segmentation" else "cnn"
    privacy = "[privacy]\nepsilon = 4.0\ndelta = 1e-5" if made.private else ""
    text = STUDY.format(title=json.dumps(made.title), kind=made.kind, classes=made.classes,
                        model=model, privacy=privacy)  # fmt: skip
    (folder / "study.toml").write_text(text)
    study = load_study(folder / "study.toml")
    names = [f"hospital-{i + 1:02d}" for i in range(made.sites)]
    main = _outcome(folder, study, made, names, rng, skill=1.5)
    skills = {"local": 0.9, "pooled": 1.6, "fedprox": 1.45} if made.baselines else {}
    result: dict[str, Any] = {
        "study": study.name, "title": study.title, "digest": study.digest,
        "task": asdict(study.task), "strategy": "fedavg", "seed": 7, "rounds": 12,
        "seconds": 312.4, "date": "2026-11-22", "selected_round": 12, **main,
        "refused": {"hospital-99": "fewer cases than its policy asks for"},
        "baselines": {
            name: _outcome(folder / "baselines" / name, study, made, names, rng, skill)
            for name, skill in skills.items()
        },
        "environment": {"medfl": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0",
                        "python": "3.11.7", "device": "cpu", "cpus": 2, "workers": 2},
        "digests": {"model": "ab" * 32, "study": study.digest},
        "cohorts": {name: "cd" * 32 for name in names},
        "n_parameters": 61_234, "bytes_per_round": 1_469_616,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    _write_rounds(folder, study, made, names, rng)
    _write_examples(folder, made, names, rng)
    return result


def _outcome(
    base: Path, study: Study, made: Made, names: list[str], rng: np.random.Generator, skill: float
) -> dict[str, Any]:
    metrics, parts, sites = default_metrics(study.task), [], []
    for place, name in enumerate(names):
        n = made.n_test if place == 0 else int(made.n_test * rng.uniform(0.6, 1.3)) + 5
        scores = _scores(study, n, rng, skill * rng.uniform(0.75, 1.2), name)
        scores.save(base / "sites" / name / "scores.npz")
        parts.append(scores)
        sites.append({
            "name": name, "n_train": 5 * n, "n_validation": n, "n_test": n,
            "metrics": summarise(study.task, scores, metrics),
            "intervals": intervals(study.task, scores, metrics, resamples=20, seed=1),
            "epsilon": 3.1234 + 0.05 * place if made.private and place != 1 else None,
            "delta": 1e-5 if made.private and place != 1 else None,
            "quarantined": {"no_mask": place % 3 + 1, "wrong-spacing": 11} if place % 2 else {},
        })  # fmt: skip
    every = concatenate(parts)
    return {
        "sites": sites, "mean": mean_over_sites([s["metrics"] for s in sites]),
        "all": summarise(study.task, every, metrics),
        "all_intervals": intervals(study.task, every, metrics, resamples=20, seed=1),
    }  # fmt: skip


def _scores(study: Study, n: int, rng: np.random.Generator, skill: float, name: str) -> Scores:
    keys = [f"{name}-{i}" for i in range(n)]
    if study.task.kind == "segmentation":
        columns: dict[str, NDArray[Any]] = {}
        for c in study.task.classes[1:]:
            columns[f"dice/{c}"] = rng.beta(4 + 8 * skill, 3, n)
            columns[f"empty_false_positives/{c}"] = rng.integers(0, 2, n).astype(np.float64)
            columns[f"hd95/{c}"] = rng.gamma(3, 1 / skill, n)
            columns[f"surface_distance/{c}"] = rng.gamma(2, 0.4 / skill, n)
        return Scores(tuple(keys), tuple(keys), columns)
    many = len(study.task.classes)
    target = rng.integers(0, many, n)
    if many == 2:
        logit = skill * (2 * target - 1) + rng.normal(0, 1.3, n)
        return score_classification(keys, keys, target, 1 / (1 + np.exp(-1.6 * logit)))
    logits = rng.normal(0, 1, (n, many)) + 1.5 * skill * np.eye(many)[target]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return score_classification(keys, keys, target, shares)


def _write_rounds(
    folder: Path, study: Study, made: Made, names: list[str], rng: np.random.Generator
) -> None:
    metric = "dice" if study.task.kind == "segmentation" else "auroc"
    start = 0.1 if metric == "dice" else 0.5
    levels = {name: rng.uniform(0.83, 0.95) for name in names}
    lines, absent = [], {names[0]: "the update has no finite norm"}
    for run, top in {"main": 1.0, "fedprox": 0.97}.items():
        for r in range(1, 14):
            grown = 1 - np.exp(-(r - 1) / 3)
            sites = [
                {"name": n, "loss": 0.9 - 0.55 * top * grown + rng.normal(0, 0.02),
                 "metrics": {metric: start + (v * top - start) * grown + rng.normal(0, 0.012)},
                 "epsilon": 0.9 * r**0.5 + 0.05 * i if made.private and i != 1 else None,
                 "seconds": 2.0}
                for i, (n, v) in enumerate(levels.items())
            ]  # fmt: skip
            mean = float(np.mean([s["metrics"][metric] for s in sites]))  # type: ignore[index]
            loss = float(np.mean([s["loss"] for s in sites]))
            lines.append({"run": run, "round": r, "seconds": 9.5, "metrics": {metric: mean},
                          "loss": loss, "sites": sites, "bytes_up": 1,
                          "left_out": absent if r == 3 else {}})  # fmt: skip
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_examples(folder: Path, made: Made, names: list[str], rng: np.random.Generator) -> None:
    y, x = np.mgrid[:72, :64]
    for name in names[:6]:
        images, targets, said = [], [], []
        for _ in range(4):
            cy, cx = rng.uniform(28, 44), rng.uniform(24, 40)
            body = np.hypot((y - 36) / 34, (x - 32) / 30) < 1
            truth, model = (
                _blobs(y, x, cy + dy, cx + dy, 11 + dy) for dy in (0, rng.normal(0, 2.5))
            )
            grey = 35 + 75 * body + 60 * (truth > 0) + rng.normal(0, 12, y.shape)
            images.append(np.clip(grey, 0, 255).astype(np.uint8))
            masks = made.kind == "segmentation"
            targets.append(truth if masks else rng.integers(0, 2, 1))
            said.append(model if masks else rng.integers(0, 2, 1))
        np.savez_compressed(
            folder / "sites" / name / "examples.npz", image=np.stack(images),
            target=np.stack(targets), prediction=np.stack(said), score=rng.uniform(0.3, 0.97, 4),
            key=np.array([f"{name}-{i}" for i in range(4)]),
        )  # fmt: skip


def _blobs(
    y: NDArray[Any], x: NDArray[Any], cy: float, cx: float, radius: float
) -> NDArray[np.uint8]:
    inside = np.hypot((y - cy) / 1.3, x - cx) < radius
    return np.where(inside, np.where(y < cy, 1, 2), 0).astype(np.uint8)


class Page(HTMLParser):
    """Collects what the tests ask about and notices elements that are not closed in order."""

    void = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.cells: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.void:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
            if {"td", "th"} & set(self.open):
                self.cells[-1] += data + " "

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@dataclass(frozen=True)
class Report:
    """A rendered run."""

    folder: Path
    made: Made
    result: dict[str, Any]
    html: str
    card: str
    page: Page


def _report(folder: Path, made: Made) -> Report:
    result = make_run(folder, made)
    html = write_report(folder).read_text(encoding="utf-8")
    return Report(folder, made, result, html, (folder / "model_card.md").read_text(), Page(html))


HOSTILE = '<script>alert("1")</script> & $\\frac{1}{2}$ --> | `x` <img src=http://x.example/y>'
KINDS = {
    "classification": Made(),
    "segmentation": Made("segmentation", SEGMENTATION, "Hippocampus in MRI", 4, 3, private=True),
    "alone": Made(sites=2, baselines=False),
    "many": Made("segmentation", SEGMENTATION, "Forty hospitals", 40, 12),
    "hostile": Made(
        classes=json.dumps(["normal", HOSTILE, '" style="x: y" id="z']),
        title=HOSTILE,
        sites=2,
        baselines=False,
    ),
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """rendered(kind): the report of KINDS[kind], made once."""
    return cache(lambda kind: _report(tmp_path_factory.mktemp("run"), KINDS[kind]))


@pytest.fixture(params=KINDS)
def report(request: pytest.FixtureRequest, rendered: Callable[[str], Report]) -> Report:
    return rendered(str(request.param))


def test_every_hospital_and_every_number_of_the_result_is_on_the_page(report: Report) -> None:
    assert {s["name"] for s in report.result["sites"]} <= {c.strip() for c in report.page.cells}
    ways = [report.result, *report.result["baselines"].values()]
    for way in ways:
        for name, number in {**way["all"], **way["mean"]}.items():
            decimals = 2 if name.startswith(("hd95", "surface")) else 3
            assert f"{number:.{decimals}f}" in report.page.text, (name, number)


def test_each_hospitals_row_holds_its_own_numbers(report: Report) -> None:
    first = "dice" if report.result["task"]["kind"] == "segmentation" else "auroc"
    for site in report.result["sites"]:
        starts = [i for i, cell in enumerate(report.page.cells) if cell.strip() == site["name"]]
        wanted = f"{site['metrics'][first]:.3f}" if site["n_test"] >= 5 else "too few"
        assert report.page.cells[starts[0] + 1].startswith(wanted)


def test_the_page_is_one_whole_file_that_fetches_and_runs_nothing(report: Report) -> None:
    page = report.page
    assert page.open == []
    assert "script" not in {tag for tag, _, _ in page.attributes}
    assert not re.search(r'(?:src|href|action)="(?!#|data:image/png)', report.html)
    assert "url(" not in report.html.replace("url(#", "")
    assert "@import" not in report.html
    # The page's own policy forbids style attributes, so a figure that used one would lose colours.
    assert page.values("style") == []
    assert next(v for v in page.values("content") if "default-src" in v).startswith(
        "default-src 'none'; style-src 'sha256-"
    )


def test_ids_are_unique_and_every_reference_inside_the_page_leads_somewhere(
    report: Report,
) -> None:
    ids = report.page.values("id")
    assert len(ids) == len(set(ids))
    wanted = [h[1:] for h in report.page.values("href") if h.startswith("#")]
    wanted += re.findall(r"url\(#([^)]+)\)", report.html)
    assert wanted
    assert set(wanted) <= set(ids)


def test_every_figure_is_described_in_words_and_every_table_has_headers(report: Report) -> None:
    drawn = [v for tag, name, v in report.page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(drawn) == report.html.count("<svg") >= 4
    assert all(len(text) > 20 for text in drawn)
    assert report.html.count("<caption") == report.html.count("<table") >= 5
    assert report.html.count('scope="row"') > len(report.result["sites"])


def test_a_hostile_title_and_class_name_are_text_and_nothing_else(
    rendered: Callable[[str], Report],
) -> None:
    report = rendered("hostile")
    assert "<script" not in report.html
    assert "<img" not in report.html
    assert HOSTILE in report.page.text
    assert report.page.text.count('style="x: y" id="z') >= 2
    assert "<script" not in report.card
    assert "<img" not in report.card
    front = report.card.split("---\n")[1]
    assert "script" not in front


def test_counts_below_five_are_masked_and_cannot_be_had_by_subtraction(
    rendered: Callable[[str], Report],
) -> None:
    report = rendered("segmentation")
    sites = report.result["sites"]
    assert sites[0]["n_test"] == 3
    for text in (report.page.text, report.card.replace("&lt;", "<")):
        data = text[text.index("Cases, split by patient") :]
        assert "<5" in data
        assert f"more than {sum(s['n_test'] for s in sites) - 3}" in data
        assert str(sum(s["n_test"] for s in sites)) not in re.findall(r"\d+", data[:900])
    assert "too few" in report.page.text


def test_privacy_is_stated_for_each_hospital_and_never_rounded_down(
    rendered: Callable[[str], Report],
) -> None:
    report = rendered("segmentation")
    # 3.1234, 3.2234 and 3.2734 were spent; the second hospital trained without.
    cells = [cell.strip() for cell in report.page.cells]
    assert {"3.13", "3.23", "3.28", "no bound"} <= set(cells)
    assert "3 of 4 hospitals trained under differential privacy, with ε of at most 3.28" in (
        report.page.text
    )
    assert "ε covers training, and training patients" in report.page.text
    assert "ε ≤ 3.28, δ ≤ 1e-05" in report.card


def test_without_privacy_the_page_says_so_plainly(rendered: Callable[[str], Report]) -> None:
    report = rendered("alone")
    assert "No differential privacy was used." in report.page.text
    assert "ε covers" not in report.page.text
    assert "nothing bounds how much" in report.page.text
    assert "Pooled training" not in report.page.text


def test_privacy_of_whole_hospitals_is_stated_beside_what_it_does_not_cover(
    tmp_path: Path,
) -> None:
    make_run(tmp_path, Made(sites=2, baselines=False))
    study = (tmp_path / "study.toml").read_text() + 'weighting = "equal"\n'
    whole = "[site_privacy]\nepsilon = 3.0\ndelta = 1e-3\nsites = 2\n"
    (tmp_path / "study.toml").write_text(study + whole)
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    lines = [json.dumps(r | {"epsilon": 1.1 + i / 1000}) for i, r in enumerate(rounds)]
    (tmp_path / "rounds.jsonl").write_text("\n".join(lines))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    spent = words.epsilon(1.1 + (len(rounds) - 1) / 1000)
    assert f"Whole hospitals are protected with ε of at most {spent}." in page
    for text in (page, (tmp_path / "model_card.md").read_text()):
        assert f"Whole hospitals: ε of {spent} at δ of 0.001" in text
        assert "does not protect a hospital from the coordinator" in text
        assert "No differential privacy was used" not in text


def test_forty_hospitals_show_the_best_and_worst_ten_and_all_in_the_table(
    rendered: Callable[[str], Report],
) -> None:
    report = rendered("many")
    ranked = sorted(report.result["sites"], key=lambda s: -s["metrics"]["dice"])
    drawn = re.findall(r"<text[^>]*>(hospital-\d+)</text>", report.html)
    shown = {s["name"] for s in ranked[:10] + ranked[-10:]}
    assert shown <= set(drawn)
    # The first six hospitals also have pictures, with their names above.
    between = {s["name"] for s in ranked[10:-10]} - {f"hospital-{i:02d}" for i in range(1, 7)}
    assert between
    assert not between & set(drawn)
    assert "The ten best and the ten worst hospitals; lines are" in report.html
    assert len(report.html) < 600_000


def test_the_figure_of_few_among_many_hospitals_says_which_they_are(tmp_path: Path) -> None:
    """Forty hospitals, of whom six have enough test cases for a figure of their own."""
    make_run(tmp_path, KINDS["many"])
    result = json.loads((tmp_path / "result.json").read_text())
    for site in result["sites"][6:]:
        site["n_test"] = 4
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "The hospitals with at least 5 test cases; lines are" in page
    assert "ten best" not in page


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (0.99, "reached 0.990: that is what privacy cost here"),
        (0.1, "reached 0.100: privacy cost nothing here"),
    ],
)
def test_what_privacy_cost_is_said_where_the_same_was_trained_without(
    tmp_path: Path, without: float, said: str
) -> None:
    result = make_run(tmp_path, Made(sites=2))
    other = {**result["baselines"]["fedprox"], "all": {"auroc": without}, "all_intervals": {}}
    result["baselines"]["no_privacy"] = other
    (tmp_path / "result.json").write_text(json.dumps(result))
    write_report(tmp_path)
    assert f"The same training without privacy {said}" in (tmp_path / "report.html").read_text()


def test_hospitals_that_were_absent_are_named_with_the_reason(report: Report) -> None:
    assert "hospital-99 took no part: fewer cases than its policy asks for" in report.page.text
    assert "hospital-01 was left out of 1 round: the update has no finite norm" in report.page.text


def test_the_same_files_give_the_same_bytes(rendered: Callable[[str], Report]) -> None:
    report = rendered("alone")
    assert write_report(report.folder).read_text(encoding="utf-8") == report.html


def test_a_run_with_nothing_but_its_results_still_has_a_report(tmp_path: Path) -> None:
    made = Made(sites=2, baselines=False)
    result = make_run(tmp_path, made)
    for path in [*tmp_path.rglob("*.npz"), tmp_path / "rounds.jsonl"]:
        path.unlink()
    bare = {k: result[k] for k in ("sites", "all", "mean", "rounds")}
    bare["sites"][0]["metrics"] = {"auroc": None}
    bare["sites"][1]["metrics"] = {"auroc": float("nan")}
    (tmp_path / "result.json").write_text(json.dumps(bare))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "–" in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rounds": 3}', '{"sites": [{"name": "a", "n_train": "x"}]}']
)
def test_a_damaged_result_is_refused_with_the_file_named(tmp_path: Path, content: str) -> None:
    make_run(tmp_path, Made(sites=1, n_test=12, baselines=False))
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(StorageError, match=r"result\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@pytest.mark.parametrize("hospitals", ["hospital-01", "hospital-*"])
def test_a_model_that_came_to_nothing_costs_no_report(
    tmp_path: Path, kind: str, hospitals: str
) -> None:
    """It gives nan for a chance or a Dice, for some hospitals' cases or for all of them."""
    made = KINDS[kind]
    make_run(tmp_path, replace(made, n_test=12))
    for file in tmp_path.glob(f"sites/{hospitals}/scores.npz"):
        scores = load(file)
        name = "probability" if kind == "classification" else "dice/anterior"
        scores.columns[name][:] = np.nan
        scores.save(file)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "nan" not in page.text.lower().split()
