"""What would end every run of a study at its start is said before anybody signs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.common import config, tensors
from medfl.common.errors import ConfigError
from medfl.common.models import MODELS
from medfl.common.study import Study
from medfl.server import authority, studies
from medfl.server.settings import ServerSettings, open_federation
from medfl.strategies.rehearsal import misfits

IMAGES: dict[str, Any] = {
    "name": "images",
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "image": {"dimensions": 2, "size": [32, 32], "intensity": "zscore"},
    "model": {"name": "cnn"},
    "training": {"local_steps": 1},
    "federation": {"rounds": 2, "min_sites": 3},
}
MASKS = {"kind": "segmentation", "classes": ["background", "organ"]}
SECURE: dict[str, Any] = {"secure_aggregation": {}}


def study(**tables: dict[str, Any]) -> Study:
    raw = {**IMAGES, **{k: {**IMAGES.get(k, {}), **v} for k, v in tables.items()}}
    return config.parse(raw, Study, "study")


def with_norm(name: str, norm: str, **tables: dict[str, Any]) -> Study:
    task = MASKS if MODELS[name].output == "masks" else IMAGES["task"]
    small = {"size": [64, 64]} if MODELS[name].output == "masks" else {}
    options = {"norm": norm}
    return study(task=task, image=small, model={"name": name, "options": options}, **tables)


def normed() -> list[str]:
    import inspect

    return [n for n, e in MODELS.items() if "norm" in inspect.signature(e.build).parameters]


@pytest.mark.parametrize("name", normed())
def test_batch_norm_under_secure_sums_is_refused_before_a_run(name: str) -> None:
    """As it was: published, approved by all, and refused at the start of each run."""
    (fault,) = misfits(with_norm(name, "batch", **SECURE))
    assert fault.startswith("secure_aggregation: bounds what each number may change")
    assert 'Set model.options.norm to "group" or "instance"' in fault
    assert misfits(with_norm(name, "group", **SECURE)) == []


def test_batch_norm_that_stays_or_is_not_there_under_privacy_is_no_fault() -> None:
    local = with_norm("cnn", "batch")
    assert misfits(local) == []
    private = {"privacy": {"epsilon": 1.0, "delta": 1e-4}, **SECURE}
    assert misfits(with_norm("cnn", "batch", **private)) == []
    fedbn = {"federation": {"strategy": "fedbn"}}
    assert misfits(with_norm("cnn", "batch", **fedbn)) == []


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"federation": {"keep": "average"}}, "federation.keep: the model has batch norm"),
        ({"federation": {"strategy": "fedbn"}, "model": {"name": "logistic", "options": None}},
         "federation.strategy: it keeps normalisation layers"),
        ({"model": {"freeze": ["nothing"]}}, "model.freeze: no parameter begins with 'nothing'"),
    ],
)  # fmt: skip
def test_other_misfits_of_model_and_strategy_are_found(
    tables: dict[str, dict[str, Any]], words: str
) -> None:
    model = {"name": "cnn", "options": {"norm": "batch"}, **tables.get("model", {})}
    (fault,) = misfits(study(**{**tables, "model": model}))
    assert words in fault


def test_an_image_size_that_the_network_cannot_take_is_found() -> None:
    (fault,) = misfits(study(task=MASKS, image={"size": [30, 30]}, model={"name": "unet"}))
    assert fault.startswith("image.size: unet")


def test_start_weights_of_another_model_are_found(tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "w.safetensors"
    tensors.save({"other": np.zeros(2, np.float32)}, file, {})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (fault,) = misfits(study(model={"start_weights": str(file), "start_weights_sha256": digest}))
    assert "other is not in the model" in fault


def test_levels_that_only_the_hospitals_know_are_no_fault(risk_study: Callable[..., Study]) -> None:
    record = {"features": [{"name": "x"}, {"name": "sex", "kind": "category"}]}
    assert misfits(risk_study(record=record)) == []


def test_such_a_study_is_not_published(tmp_path: Path) -> None:
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    federation = open_federation(tmp_path / "fed")
    with pytest.raises(ConfigError, match="running statistics of this model"):
        studies.publish(federation, with_norm("cnn", "batch", **SECURE))
    assert studies.published(federation) == []
