"""Was this patient there? From real answers of a private hospital whose network has dropout.

The attacker knows everything but the key: weights, the instruction with its seed, and every other
patient. Draws that followed from the seed, by place in the batch, told it what one patient's
presence does to everybody's dropout: 5 clipping bounds in place of one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from medfl.client.data.cohort import build_cohort
from medfl.client.hospital import Hospital, answer
from medfl.common import config
from medfl.common.messages import Instruction
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.packing import unpack
from medfl.common.site import SitePrivacy
from medfl.common.source import DataSource
from medfl.common.statistics import Shared, statistics_to_plain
from medfl.common.study import Study

EPSILON, DELTA, OTHERS, TRIALS = 1.0, 1e-3, 40, 150
FEATURES = [f"f{i}" for i in range(12)]
STUDY: dict[str, Any] = {
    "name": "members",
    "task": {"kind": "risk", "classes": ["well", "ill"]},
    "record": {"features": [{"name": n, "range": [-4, 4]} for n in FEATURES], "scale": "range"},
    "model": {"name": "mlp", "options": {"hidden": [64, 32], "dropout": 0.5}},
    "training": {"learning_rate": 1.0, "local_steps": 1, "batch_size": OTHERS},
    "federation": {"rounds": 1},
    "evaluation": {"split": "given", "bootstrap": 0},
    "privacy": {"epsilon": EPSILON, "delta": DELTA, "sample_rate": 1.0, "clip": 0.01},
    "quality": {"min_cases": 1},
}
PRIVACY = SitePrivacy(epsilon=EPSILON, delta=DELTA, declared_patients=OTHERS, declared_cases=OTHERS)


@pytest.fixture
def released(tmp_path: Path) -> Callable[..., np.ndarray]:
    """released(there, trial, simulated): one round's update, with the patient or without."""
    study = config.parse(STUDY, Study, "study.toml")
    weights = get_weights(
        build_model(study, Shared(private=True), n_features=len(FEATURES), seed=7)
    )
    cohorts = {there: _cohort(tmp_path, study, there) for there in (True, False)}

    def release(there: bool, trial: int = 0, simulated: bool = False) -> np.ndarray:
        folder = tmp_path / f"{there}-{trial}-{simulated}"
        site = Hospital(
            name="st-anna",
            study=study,
            load_cohort=lambda: cohorts[there],
            folder=folder,
            privacy=PRIVACY,
            ledger_folder=folder / "ledger",
            simulated=simulated,
        )
        asked = Instruction(
            kind="round",
            study_digest=study.digest,
            run="main",
            round=1,
            seed=7,
            shared=statistics_to_plain(Shared(private=True)),
            parts=(),
            weights=weights,
        )
        delta = unpack(answer(site, asked).delta, {n: a.shape for n, a in weights.items()})
        return np.concatenate([delta[n].astype(float).ravel() for n in weights])

    return release


def _cohort(folder: Path, study: Study, there: bool) -> Any:
    """The others, and before them in the table the patient in question."""
    rng = np.random.default_rng(1)
    lines = [",".join(["case", "patient", *FEATURES, "label", "split"])]
    for i in range(OTHERS + 1):
        values = ",".join(f"{v:.3f}" for v in rng.normal(size=len(FEATURES)).clip(-4, 4))
        label = ["well", "ill"][i % 2]
        if i or there:
            lines.append(f"c{i:02d},p{i:02d},{values},{label},train")
    file = folder / f"cases-{there}.csv"
    file.write_text("\n".join(lines) + "\n")
    source = DataSource(format="table", path=file, columns={"case": "case"})
    return build_cohort(source, study, cache=None)


def test_a_membership_attack_on_answers_with_dropout_shows_no_more_than_epsilon(released) -> None:
    # What the patient's presence moves, as far as the attacker can work it out: with one seed and
    # one simulated key the noise is the same in both and cancels.
    direction = released(True, simulated=True) - released(False, simulated=True)
    direction /= np.linalg.norm(direction)
    out = np.array([released(False, trial) @ direction for trial in range(2 * TRIALS)])
    in_ = np.array([released(True, trial) @ direction for trial in range(TRIALS)])
    # The threshold comes from answers that are not counted; 3 % of those without lie above.
    threshold = np.quantile(out[:TRIALS], 0.97)
    false, true = int((out[TRIALS:] > threshold).sum()), int((in_ > threshold).sum())
    # 97.5 % limits of both shares (Clopper and Pearson 1934).
    at_most = stats.beta.ppf(0.975, false + 1, TRIALS - false)
    at_least = stats.beta.ppf(0.025, true, TRIALS - true + 1) if true else 0.0
    assert at_least <= np.exp(EPSILON) * at_most + DELTA
