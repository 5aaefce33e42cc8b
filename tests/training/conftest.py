"""Small studies and case sets for the tests of models and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from medfl.client.training.caseset import CaseSet
from medfl.common.config import parse
from medfl.common.models import MODELS
from medfl.common.study import Study


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_study() -> Callable[..., Study]:
    """make_study(model="cnn", size=[8, 8], kind="classification", classes=2, training keys...)."""

    def make(
        model: str = "logistic",
        size: list[int] | None = None,
        kind: str = "classification",
        classes: int = 2,
        features: int = 0,
        rounds: int = 1,
        options: dict[str, Any] | None = None,
        more_model: dict[str, Any] | None = None,
        multi_label: bool = False,
        image: dict[str, Any] | None = None,
        **training: Any,
    ) -> Study:
        if not {"local_steps", "local_epochs"} & training.keys():
            training["local_epochs"] = 1
        raw: dict[str, Any] = {
            "name": "test",
            "task": {
                "kind": kind,
                "classes": [f"class{k}" for k in range(classes)],
                "multi_label": multi_label,
            },
            "model": {"name": model, "options": options, **(more_model or {})},
            "training": training,
            "federation": {"rounds": rounds},
        }
        if features:
            raw["record"] = {"features": [{"name": f"f{k}"} for k in range(features)]}
        else:
            size = size or [8, 8]
            raw["image"] = {"dimensions": len(size), "size": size, **(image or {})}
        return parse(raw, Study, "test")

    return make


@pytest.fixture(scope="session")
def make_cases() -> Callable[..., CaseSet]:
    """make_cases(inputs, targets) or make_cases(study=..., n=4): random cases of the study."""

    def make(
        inputs: Any = None,
        targets: Any = None,
        study: Study | None = None,
        n: int = 4,
        seed: int = 0,
    ) -> CaseSet:
        if study is not None:
            inputs, targets = _random(study, n, np.random.default_rng(seed))
        keys = tuple(f"{i:04x}" for i in range(len(inputs)))
        return CaseSet(inputs, targets, keys, keys)

    return make


@pytest.fixture(scope="session")
def make_tried(make_study) -> Callable[..., tuple[Study, torch.Tensor, torch.Tensor]]:
    """make_tried(model, dimensions, n=2, **options): a study, float64 inputs, targets."""

    def make(name: str, dimensions: int, n: int = 2, **options: Any) -> Any:
        segments = MODELS[name].output == "masks"
        side = 32 if name.startswith(("densenet", "basic")) else 16
        side = 8 if dimensions == 3 and name == "unet" else side
        study = make_study(
            name,
            [side] * dimensions,
            kind="segmentation" if segments else "classification",
            classes=3 if segments else 2,
            loss="dice_ce" if segments else "cross_entropy",
            options={"channels": [4, 8, 8], **options} if name == "unet" else options or None,
        )
        generator = torch.Generator().manual_seed(1)
        size = [side] * dimensions
        x = torch.randn(n, 1, *size, generator=generator, dtype=torch.float64)
        masks = torch.randint(0, 3, (n, *size), generator=generator)
        return study, x, masks if segments else torch.arange(n) % 2

    return make


def _random(study: Study, n: int, rng: np.random.Generator) -> tuple[Any, Any]:
    k = len(study.task.classes)
    if study.image is None:
        assert study.record is not None
        return rng.normal(size=(n, len(study.record.features))).astype(np.float32), rng.integers(
            0, k, n
        )
    size = tuple(study.image.size)
    inputs = rng.normal(size=(n, study.image.channels, *size)).astype(np.float32)
    if study.task.kind == "segmentation":
        return inputs, rng.integers(0, k, (n, *size)).astype(np.uint8)
    if study.task.multi_label:
        return inputs, rng.integers(0, 2, (n, k)).astype(np.float32)
    return inputs, rng.integers(0, k, n)
