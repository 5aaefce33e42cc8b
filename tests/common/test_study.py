"""study.toml: the digest is the agreement, and contradictions are found before anybody trains."""

from __future__ import annotations

import ast
import copy
import dataclasses
import math
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import medfl.common.study as module
from medfl.common import config
from medfl.common.errors import ConfigError
from medfl.common.study import Study, load_study

TEXT = """
name = "hearts"
title = "Who will fall ill"
[task]
kind = "classification"
classes = ["well", "ill"]
label_map = { "0" = "well", "1" = "ill" }
[model]
name = "cnn"
start_weights = "start.safetensors"
start_weights_sha256 = "ab"
freeze = ["stem"]
options = { width = 8, rate = 0.5, deep = true, kind = "small", strides = [1, 2] }
[image]
dimensions = 2
size = [28, 28]
spacing_mm = [1.0, 1.0]
intensity = "range"
window = [-100.0, 300.0]
[training]
learning_rate = 1.0
local_epochs = 2
class_weights = [1.0, 3.0]
augment = [{ name = "flip", probability = 1.0, options = { axis = 0 } }]
[federation]
rounds = 5
min_sites = 2
strategy = "fedprox"
options = { mu = 1.0 }
sites_per_round = 3
keep = "best"
best_metric = "accuracy"
[privacy]
epsilon = 8.0
delta = 1e-5
metrics_epsilon = 1.0
[secure_aggregation]
threshold = 0.6
range = 2.0
max_norm = 5.0
[evaluation]
folds = 5
fold = 1
metrics = ["auroc"]
[simulation]
data = { format = "table", path = "a.csv", table = "b.csv", columns = { age = "AGE" } }
partition = { kind = "label_skew", sites = 4 }
"""


def study(text: str = TEXT) -> Study:
    return config.parse(tomllib.loads(text), Study, "study.toml")


DIGEST = study().digest


def test_the_digest_is_a_sha256_and_stays_the_same() -> None:
    assert len(bytes.fromhex(DIGEST)) == 32
    assert study().digest == DIGEST


def test_comments_and_blank_lines_do_not_matter() -> None:
    assert study(TEXT.replace("\n", "  # agreed in May\n\n")).digest == DIGEST


def test_the_order_of_keys_does_not_matter() -> None:
    def shuffled(value: Any, rng: random.Random) -> Any:
        if not isinstance(value, dict):
            return value
        keys = rng.sample(sorted(value), len(value))
        return {key: shuffled(value[key], rng) for key in keys}

    raw = tomllib.loads(TEXT)
    for seed in range(10):
        other = shuffled(raw, random.Random(seed))
        assert config.parse(other, Study, "study.toml").digest == DIGEST


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("learning_rate = 1.0", "learning_rate = 1"),
        ("epsilon = 8.0", "epsilon = 0.8e1"),
        ("delta = 1e-5", "delta = 0.000_01"),
        ("probability = 1.0", "probability = 1"),
        ("window = [-100.0, 300.0]", "window = [-100, 3e2]"),
        ("mu = 1.0", "mu = 1"),
        ("strides = [1, 2]", "strides = [1.0, 2.0]"),
    ],
)
def test_the_spelling_of_a_number_does_not_matter(one: str, other: str) -> None:
    assert one in TEXT
    assert study(TEXT.replace(one, other)).digest == DIGEST


def test_a_default_that_is_written_out_does_not_matter() -> None:
    assert study(TEXT.replace("[federation]", '[federation]\nweighting = "cases"')).digest == DIGEST


def test_true_is_not_one_and_text_is_not_a_number() -> None:
    assert study(TEXT.replace("deep = true", "deep = 1")).digest != DIGEST
    assert study(TEXT.replace("width = 8", 'width = "8"')).digest != DIGEST


def changes(value: Any) -> Iterator[Any]:
    """Values that differ from `value` in one place."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            for other in changes(getattr(value, field.name)):
                yield dataclasses.replace(value, **{field.name: other})
    elif isinstance(value, dict):
        yield value | {"another": 1}
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: other} for other in changes(inner))
    elif isinstance(value, list | tuple):
        kind = type(value)
        yield kind([*value, "another"])
        for at, inner in enumerate(value):
            yield kind([*value[:at], *value[at + 1 :]])
            yield from (kind([*value[:at], o, *value[at + 1 :]]) for o in changes(inner))
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, float):
        yield from (-value - 1.0, math.nextafter(value, math.inf))
    elif isinstance(value, int):
        yield from (value + 1, -value - 1)
    elif value is None:
        yield "something"
    else:
        yield type(value)(f"{value}x")


def test_every_change_of_one_value_changes_the_digest() -> None:
    agreed = study()
    moved = agreed.model.start_weights
    others = [o for o in changes(agreed) if o.model.start_weights == moved]
    digests = {other.digest for other in others}
    assert len(others) > 150
    assert DIGEST not in digests
    assert len(digests) == len({repr(other) for other in others})


def test_where_start_weights_lie_is_each_machines_own_affair(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "study.toml").write_text(TEXT, encoding="utf-8")
    one, other = load_study(here / "study.toml"), load_study(there / "study.toml")
    assert one.model.start_weights == here / "start.safetensors"
    assert one.digest == other.digest == DIGEST
    assert study(TEXT.replace('sha256 = "ab"', 'sha256 = "ac"')).digest != DIGEST


def test_another_strategy_takes_its_own_defaults() -> None:
    other = study().with_strategy("fedavg")
    assert (other.federation.strategy, other.federation.options) == ("fedavg", None)
    assert other.digest != DIGEST
    assert study().with_strategy("fedprox").digest == DIGEST


# What to write over the study below, by table, and the fault that it must give. `None` drops a key.
Over = dict[str, dict[str, Any] | None]
RECORD = {"features": [{"name": "age", "range": [0, 100]}]}
WHOLE = {"epsilon": 1.0, "delta": 1e-5, "sites": 4}
EQUAL = {"weighting": "equal"}
CONTRADICTIONS: list[tuple[Over, str]] = [
    ({"task": {"classes": ["ill"]}}, "task.classes: has fewer than two names; name every class"),
    ({"task": {"classes": ["a", "a"]}}, "task.classes: names a class twice"),
    (
        {"task": {"kind": "risk", "classes": ["a", "b", "c"]}},
        'task.classes: a risk has two outcomes; write ["no event", "event"]',
    ),
    ({"task": {"label_map": {"9": "dead"}}}, "task.label_map.9: 'dead' is not in task.classes"),
    (
        {"task": {"kind": "risk", "multi_label": True}},
        "task.multi_label: only a classification has it; remove the key",
    ),
    ({"image": None}, "image, record: a study has exactly one of these tables; keep one"),
    ({"record": RECORD}, "image, record: a study has exactly one of these tables; keep one"),
    (
        {"task": {"kind": "segmentation"}, "image": None, "record": RECORD},
        "record: a segmentation needs images; write an [image] table",
    ),
    ({"image": {"size": [28]}}, "image.size: has 1 numbers for 2 dimensions; write 2"),
    ({"image": {"spacing_mm": [1.0]}}, "image.spacing_mm: write 2 numbers, one an axis"),
    ({"image": {"intensity": "range"}}, 'image.window: is missing; intensity = "range" needs'),
    ({"image": {"window": [3.0, 3.0]}}, "image.window: low must be below high"),
    ({"image": {"orientation": "RLS"}}, "image.orientation: write one of each pair"),
    ({"image": {"fit": "keep"}}, 'image.fit: "keep" serves segmentation only'),
    ({"image": None, "record": {"features": []}}, "record.features: is empty; name at least one"),
    (
        {"image": None, "record": {"features": [{"name": "age"}, {"name": "age"}]}},
        "record.features: names a feature twice; remove one",
    ),
    (
        {"image": None, "record": {"features": [{"name": "age", "range": [5, 5]}]}},
        "record.features.0.range: low must be below high",
    ),
    (
        {"image": None, "record": {"features": [{"name": "age", "scale_range": [9, 5]}]}},
        "record.features.0.scale_range: low must be below high",
    ),
    (
        {
            "image": None,
            "record": {"features": [{"name": "x", "kind": "category", "levels": ["1", "1.0"]}]},
        },
        "record.features.0.levels: names a level twice",
    ),
    (
        {"image": None, "record": {"scale": "range", "features": [{"name": "age"}]}},
        'record.features.0.range: is missing; scale = "range" needs [low, high] for age',
    ),
    (
        {"model": {"start_weights": "a.safetensors"}},
        "model.start_weights, model.start_weights_sha256: go together; write both",
    ),
    (
        {"training": {"local_epochs": 1}},
        "training.local_steps, training.local_epochs: write exactly one of the two",
    ),
    (
        {"training": {"local_steps": None}},
        "training.local_steps, training.local_epochs: write exactly one of the two",
    ),
    ({"training": {"loss": "dice"}}, 'training.loss: "dice" compares masks; use "cross_entropy"'),
    ({"training": {"class_weights": [1.0]}}, "training.class_weights: write 2 numbers, one a"),
    ({"training": {"warmup_rounds": 5}}, "training.warmup_rounds: must be at least 0 and below"),
    ({"training": {"warmup_rounds": -1}}, "training.warmup_rounds: must be at least 0 and below"),
    ({"federation": {"keep": "best"}}, "federation.best_metric: is missing"),
    (
        {
            "federation": {"keep": "best", "best_metric": "auroc"},
            "evaluation": {"validation": 0.0},
        },
        "evaluation.validation: is 0",
    ),
    (
        {"federation": {"min_sites": 3, "sites_per_round": 2}},
        "federation.sites_per_round: must be at least federation.min_sites",
    ),
    ({"privacy": {"epsilon": 1.0, "delta": 1.0}}, "privacy.delta: must be below 1; use less than"),
    (
        {"privacy": {"epsilon": 1.0, "delta": 1e-5}, "image": {"intensity": "federated"}},
        'privacy: image.intensity (write "zscore", "percentiles" or "range"); without that',
    ),
    (
        {
            "privacy": {"epsilon": 1.0, "delta": 1e-5},
            "record": {"features": [{"name": "a"}], "scale": "site"},
            "task": {"kind": "risk", "classes": ["no", "yes"]},
        },
        'privacy: record.scale (write "range"',
    ),
    (
        {
            "privacy": {"epsilon": 1.0, "delta": 1e-5},
            "federation": {"keep": "best", "best_metric": "accuracy"},
        },
        "federation.best_metric: no private hospital reports metrics",
    ),
    (
        {
            "privacy": {"epsilon": 1.0, "delta": 1e-5, "metrics_epsilon": 1.0},
            "federation": {"keep": "best", "best_metric": "auroc"},
        },
        "federation.best_metric: cannot be released with noise",
    ),
    (
        {
            "federation": {"keep": "best", "best_metric": "accuracy", "min_sites": 3},
            "secure_aggregation": {"range": 1.0},
        },
        "federation.best_metric: no hospital tells its own metrics with [secure_aggregation]",
    ),
    (
        {
            "privacy": {"epsilon": 1.0, "delta": 1e-5, "metrics_epsilon": 1.0},
            "task": {"multi_label": True},
        },
        "privacy.metrics_epsilon: is not for multi_label tasks yet",
    ),
    (
        {"federation": {"min_sites": 1}, "secure_aggregation": {}},
        "federation.min_sites: must be at least 2 with [secure_aggregation]",
    ),
    (
        {
            "federation": EQUAL | {"min_sites": 3},
            "secure_aggregation": {},
            "site_privacy": WHOLE,
        },
        "secure_aggregation: does not go with [site_privacy] yet",
    ),
    (
        {"site_privacy": WHOLE | {"delta": 0.25}, "federation": EQUAL},
        "site_privacy.delta: must be below 1 / sites",
    ),
    ({"site_privacy": WHOLE}, 'federation.weighting: write "equal"'),
    (
        {"site_privacy": WHOLE, "federation": EQUAL | {"sites_per_round": 2}},
        "federation.sites_per_round: remove it; with [site_privacy]",
    ),
    (
        {"site_privacy": WHOLE, "federation": EQUAL | {"min_sites": 5}},
        "site_privacy.sites: must be at least federation.min_sites",
    ),
    (
        {"site_privacy": WHOLE, "federation": EQUAL | {"best_metric": "auroc"}},
        'federation.best_metric: remove it and write keep = "last"',
    ),
    (
        {
            "site_privacy": WHOLE,
            "federation": EQUAL,
            "model": {"options": {"norm": "batch"}},
        },
        "model.options.norm: batch norm's variances cannot carry the noise",
    ),
    (
        {"site_privacy": WHOLE, "federation": EQUAL, "image": {"intensity": "federated"}},
        "site_privacy: image.intensity (write",
    ),
    (
        {"evaluation": {"validation": 0.5, "test": 0.5}},
        "evaluation.validation, evaluation.test: leave no patients for training",
    ),
    ({"evaluation": {"folds": 5, "fold": 5}}, "evaluation.fold: must be from 0 to"),
    ({"evaluation": {"folds": 5, "fold": -1}}, "evaluation.fold: must be from 0 to"),
    ({"evaluation": {"folds": 1}}, "evaluation.folds: one fold leaves nothing to train on"),
    ({"evaluation": {"bootstrap": -1}}, "evaluation.bootstrap: must be at least 0"),
    ({"simulation": {}}, "simulation.sites, simulation.data: write exactly one of the two"),
    (
        {"simulation": {"data": {"format": "dicom", "path": "x"}}},
        "simulation.data, simulation.partition: go together; write both or none",
    ),
    (
        {"simulation": {"sites": [{"name": "a", "data": {"format": "dicom", "path": "x"}}] * 2}},
        "simulation.sites: names a site twice; give each its own name",
    ),
    (
        {
            "simulation": {
                "data": {"format": "table", "path": "x"},
                "partition": {"kind": "column", "sites": 2},
            }
        },
        "simulation.partition.column: is missing; name the table's column",
    ),
    (
        {
            "simulation": {
                "data": {"format": "table", "path": "x"},
                "partition": {"kind": "iid", "column": "a"},
            }
        },
        "simulation.partition.sites: is missing; say how many sites",
    ),
]


def small(over: Over) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "hearts",
        "task": {"kind": "classification", "classes": ["well", "ill"]},
        "image": {"dimensions": 2, "size": [28, 28]},
        "model": {"name": "cnn"},
        "training": {"local_steps": 4},
        "federation": {"rounds": 5},
    }
    for table, values in copy.deepcopy(over).items():
        if values is None:
            del raw[table]
            continue
        merged = raw.get(table, {}) | values
        raw[table] = {key: value for key, value in merged.items() if value is not None}
    return raw


def faults_of(over: Over) -> list[str]:
    try:
        config.parse(small(over), Study, "study.toml")
    except ConfigError as error:
        return error.faults
    return []


def test_the_small_study_itself_has_no_faults() -> None:
    assert faults_of({}) == []


@pytest.mark.parametrize(("over", "fault"), CONTRADICTIONS)
def test_a_contradiction_is_told_once_with_its_remedy(over: Over, fault: str) -> None:
    assert [f for f in faults_of(over) if f.startswith(f"study.toml: {fault}")] != []
    assert len(faults_of(over)) == len(set(faults_of(over)))


def keys_that_checks_name() -> Iterator[str]:
    """The beginnings of all messages in common/study.py, as far as the key."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.append":
            text = next(n for n in ast.walk(node) if isinstance(n, ast.Constant))
            yield str(text.value).split(": ")[0]


def test_every_check_has_a_contradiction_above() -> None:
    tried = [fault for over, _ in CONTRADICTIONS for fault in faults_of(over)]
    keys = list(keys_that_checks_name())
    assert len(keys) > 25
    untried = [key for key in keys if not any(f.startswith(f"study.toml: {key}") for f in tried)]
    assert untried == []


@pytest.mark.parametrize(
    "over",
    [
        {"task": {"classes": ["a"], "multi_label": True}},
        {"task": {"kind": "segmentation"}, "image": {"fit": "keep"}, "training": {"loss": "dice"}},
        {"image": {"dimensions": 3, "size": [8, 8, 8], "orientation": "LPI"}},
        {"training": {"local_steps": None, "local_epochs": 1, "warmup_rounds": 4}},
        {"image": None, "record": RECORD | {"scale": "range"}},
        {"evaluation": {"folds": 2, "fold": 1, "validation": 0.0, "bootstrap": 0}},
    ],
)
def test_what_looks_odd_but_makes_sense_is_allowed(over: Over) -> None:
    assert faults_of(over) == []


@pytest.mark.parametrize("threshold", [0.0, 0.49, 1.0, -1])
def test_a_threshold_at_or_below_half_is_no_threshold(threshold: float) -> None:
    """0.5 asks for more than half; less is refused, and all sites could never be more."""
    with pytest.raises(ConfigError, match=r"secure_aggregation\.threshold"):
        study(TEXT.replace("threshold = 0.6", f"threshold = {threshold}"))
    study(TEXT.replace("threshold = 0.6", "threshold = 0.5"))


def test_all_faults_of_secure_aggregation_come_at_once() -> None:
    text = TEXT.replace("threshold = 0.6\nrange = 2.0", 'threshold = 0.2\nrange = 0\nrnage = "1"')
    with pytest.raises(ConfigError) as caught:
        study(text)
    found = "\n".join(caught.value.faults)
    assert all(f"secure_aggregation.{key}" in found for key in ("threshold", "range", "rnage"))
