"""Membership inference: was this patient trained on? By the loss alone.

Yeom et al. 2018, "Privacy risk in machine learning", adversary 1: who was trained on has the
smaller loss. Labels are coins, so that whatever the model knows about them it has by heart. The
area under the ROC curve is 1/2 for guessing; (epsilon, delta) allows `best_possible` at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfl.client.training.caseset import CaseSet
from medfl.client.training.loop import train
from medfl.client.training.plan import DpPlan, TrainPlan
from medfl.common import accounting, config
from medfl.common.models import build_model
from medfl.common.noise import key_from
from medfl.common.seeds import derive
from medfl.common.statistics import Shared
from medfl.common.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

PATIENTS, FEATURES, STEPS, RATE, DELTA = 120, 150, 60, 0.5, 1e-3
# None: no privacy.
EPSILONS: tuple[float | None, ...] = (None, 8.0, 1.0)


@dataclass(frozen=True, slots=True)
class Told:
    """losses: of patients that were trained on, and of others. auc, interval: of the attack."""

    members: Floats
    others: Floats
    auc: float
    interval: tuple[float, float]


def run(seed: int = 0) -> dict[str, Told]:
    """Train on the same patients without privacy and under each epsilon, and attack."""
    return {named(epsilon): attack(epsilon, seed) for epsilon in EPSILONS}


def named(epsilon: float | None) -> str:
    """How a setting is called in figures."""
    return "no protection" if epsilon is None else f"ε = {epsilon:g}"


def attack(epsilon: float | None, seed: int) -> Told:
    """Losses after training with DP-SGD at this epsilon, or without, and the attack on them."""
    import torch

    rng = np.random.default_rng(derive(seed, "patients"))
    inputs = rng.normal(size=(2 * PATIENTS, FEATURES)).astype(np.float32)
    labels = rng.integers(0, 2, 2 * PATIENTS)
    names = tuple(f"{n:04x}" for n in range(PATIENTS))
    cases = CaseSet(inputs[:PATIENTS], labels[:PATIENTS], names, names)
    shared, dp = Shared(private=epsilon is not None), None
    if epsilon is not None:
        sigma = accounting.noise_multiplier_for(epsilon, DELTA, RATE, STEPS)
        key = key_from(seed, "epsilon", str(epsilon))
        dp = DpPlan(sigma, RATE, clip=1.0, n_declared=PATIENTS, key=key)
    model = build_model(_study(), shared, n_features=FEATURES, seed=derive(seed, "weights"))
    train(model, cases, _study(), shared, TrainPlan(1, 1, seed=seed, dp=dp))
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs))[:, 0].double().numpy()
    losses = np.logaddexp(0.0, np.where(labels == 1, -logits, logits))
    members, others = losses[:PATIENTS], losses[PATIENTS:]
    return Told(members, others, auc(members, others), interval(members, others, seed))


def auc(members: Floats, others: Floats) -> float:
    """Chance that a member has a smaller loss than another patient; ties count half."""
    below = (members[:, None] < others[None]).mean()
    return float(below + 0.5 * (members[:, None] == others[None]).mean())


def interval(members: Floats, others: Floats, seed: int) -> tuple[float, float]:
    """95 %, from patients drawn again 500 times."""
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    drawn = [
        auc(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(500)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def best_possible(epsilon: float, delta: float) -> float:
    """The largest area under a ROC curve that (epsilon, delta) allows: between its two lines.

    Kairouz, Oh and Viswanath 2015, theorem 2.1: true positives <= e^eps false positives + delta,
    and the same with the roles exchanged.
    """
    false = np.linspace(0.0, 1.0, 100_001)
    true = np.minimum(np.exp(epsilon) * false + delta, 1 - np.exp(-epsilon) * (1 - delta - false))
    return float(np.trapezoid(np.clip(true, 0.0, 1.0), false))


def roc(told: Told) -> tuple[Floats, Floats]:
    """(false positives, true positives) over all thresholds of the loss."""
    thresholds = np.sort(np.concatenate([[-np.inf], told.members, told.others]))
    false = (told.others[None] <= thresholds[:, None]).mean(axis=1)
    true = (told.members[None] <= thresholds[:, None]).mean(axis=1)
    return np.asarray(false), np.asarray(true)


def draw(found: Mapping[str, Told], figure: Figure) -> None:
    """ROC curves of the attack, with their areas."""
    from medfl.server.report.plot import DASHES, GREY, SERIES

    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, lw=1)
    for (what, told), colour, dash in zip(found.items(), SERIES, DASHES, strict=False):
        low, high = told.interval
        label = f"{what}: {told.auc:.2f} ({low:.2f}–{high:.2f})"
        axes.plot(*roc(told), color=colour, ls=dash, label=label)
    axes.set_xlabel("others taken for members")
    axes.set_ylabel("members found")
    axes.set_title("Who was trained on? By the loss")
    axes.legend(loc="lower right", title="area (95 %)")


@cache
def _study() -> Study:
    plain = {
        "name": "membership",
        "task": {"kind": "risk", "classes": ["no", "yes"]},
        "record": {"features": [{"name": f"f{n}"} for n in range(FEATURES)], "scale": "none"},
        "model": {"name": "logistic"},
        "training": {"learning_rate": 2.0, "batch_size": PATIENTS, "local_steps": STEPS},
        "federation": {"rounds": 1},
    }
    return config.parse(plain, Study, "membership")
