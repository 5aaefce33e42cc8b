"""The curve of what privacy costs: its settings, a run of each, and its figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medfl.common import cli
from medfl.common.errors import ConfigError
from medfl.common.study import load_study
from medfl.simulations.utility import Setting, app, settings_of, values_of, with_setting

STUDY = """
name = "small"
[task]
kind = "risk"
classes = ["no", "yes"]
[record]
scale = "range"
features = [{ name = "a", range = [-3, 3] }, { name = "b", range = [-3, 3] }]
[model]
name = "logistic"
[training]
learning_rate = 0.5
local_steps = 2
[federation]
rounds = 2
[privacy]
epsilon = 4.0
delta = 1e-3
sample_rate = 0.5
[[simulation.sites]]
name = "north"
data = { format = "table", path = "north.csv" }
[[simulation.sites]]
name = "south"
data = { format = "table", path = "south.csv" }
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    for number, name in enumerate(("north", "south")):
        points = np.random.default_rng(number).normal(size=(120, 2))
        rows = [f"p{k},{a:.3f},{b:.3f},{'yes' if a > b else 'no'}" for k, (a, b) in
                enumerate(points)]  # fmt: skip
        (tmp_path / f"{name}.csv").write_text("\n".join(["patient,a,b,label", *rows]))
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path / "study.toml"


def test_settings_are_read_with_the_studys_delta_where_none_is_said(study_file: Path) -> None:
    study = load_study(study_file)
    assert settings_of(study, "0.1:1e-4, 8,none") == [
        Setting(0.1, 1e-4), Setting(8.0, 1e-3), Setting(None, 1e-3),
    ]  # fmt: skip
    assert values_of("0.1=.606,none=.712") == {"0.1": 0.606, "none": 0.712}
    for wrong in ("1:small", "much", ""):
        with pytest.raises(ConfigError, match="--epsilons"):
            settings_of(study, wrong)
    with pytest.raises(ConfigError, match="--others"):
        values_of("0.1")


def test_nothing_but_privacy_differs_between_the_points(study_file: Path) -> None:
    study = load_study(study_file)
    private, bare = (with_setting(study, Setting(e, 1e-4)) for e in (0.5, None))
    assert private.privacy is not None
    assert (private.privacy.epsilon, private.privacy.delta) == (0.5, 1e-4)
    assert private.privacy.sample_rate == 0.5
    assert bare.privacy is None
    assert (private.training, private.federation) == (bare.training, bare.federation)


@pytest.mark.slow
def test_more_epsilon_buys_a_better_model_and_no_more_is_spent(
    study_file: Path, tmp_path: Path
) -> None:
    argv = [str(study_file), "--data", str(tmp_path), "--out", str(tmp_path / "out"),
            "--epsilons", "0.01:1e-4,8,none", "--others", "8=.5", "--metric", "auroc"]  # fmt: skip
    assert cli.run(app, argv, "utility") == 0
    none, some, bare = json.loads((tmp_path / "out" / "small.json").read_text())
    assert 0 < none["spent"] <= 0.01
    assert 0 < some["spent"] <= 8
    assert bare["spent"] is None
    assert some["mean"] > 0.9
    assert none["mean"] < some["mean"] <= bare["mean"] + 0.05
    assert "auroc" in (tmp_path / "out" / "small.svg").read_text()
