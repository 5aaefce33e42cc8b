"""Running statistics of real networks with batch norm: averaged, whatever the strategy does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.client.data.cases import Case, Cohort
from medfl.client.hospital import Hospital, answer
from medfl.common.errors import ConfigError, MedflError
from medfl.common.messages import Instruction, Reply, refusal
from medfl.common.study import ImageInput, Model, SecureAggregation, SiteLevelPrivacy, Study
from medfl.common.tensors import Tensors
from medfl.server.rounds import run_study
from medfl.strategies.buffers import moved

MEAN, VARIANCE = "1.running_mean", "1.running_var"
SIZES = {"a": 6, "b": 8, "c": 12}


class Pictures:
    """Three hospitals in this process, whose pictures differ in brightness and contrast."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.hospitals = {n: _hospital(study, folder, n) for n in SIZES}
        self.changes: list[dict[str, Mapping[str, Any]]] = [{}]

    def names(self) -> list[str]:
        return list(self.hospitals)

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for name, asked in instructions:
            try:
                reply = answer(self.hospitals[name], asked)
            except MedflError as error:
                reply = refusal(name, error, asked.round)
            if asked.kind == "round":
                if len(self.changes) == asked.round:
                    self.changes.append({})
                self.changes[asked.round][name] = dict(reply.delta)
            yield reply


def _hospital(study: Study, folder: Path, name: str) -> Hospital:
    rng, n = np.random.default_rng(ord(name)), SIZES[name]
    place = "abc".index(name)
    pictures = (rng.normal(scale=0.2 + place, size=(n, 1, 8, 8)) + 5 * place**3).astype(np.float32)
    cases = tuple(Case(f"{i}", f"{i}", "train") for i in range(n))
    cohort = Cohort(cases, pictures, np.arange(n) % 2, digest=name)
    return Hospital(name, study, lambda: cohort, folder / name, simulated=True)


@pytest.fixture
def bn_study(risk_study: Callable[..., Study]) -> Callable[..., Study]:
    def make(**federation: Any) -> Study:
        base = risk_study(
            training={"learning_rate": 0.1, "local_steps": 3, "batch_size": 4},
            federation={"rounds": 4, **federation},
        )
        return replace(
            base,
            task=replace(base.task, kind="classification"),
            record=None,
            image=ImageInput(dimensions=2, size=[8, 8], intensity="none"),
            model=Model(name="cnn", options={"channels": [4], "dense": 0, "norm": "batch"}),
        )

    return make


def trained(study: Study, folder: Path) -> tuple[list[Tensors], Pictures]:
    """The model after each round, and the hospitals with what each of them sent."""
    seen: list[Tensors] = []
    here = Pictures(study, folder)
    run_study(study, here, seed=1, on_round=lambda record, weights: seen.append(weights))
    return seen[: study.federation.rounds], here


def test_a_variance_moves_by_the_mean_change_and_never_below_zero() -> None:
    before = {VARIANCE: np.float32([1.0, 0.25]), "0.weight": np.float32([3.0])}
    after = moved(before, {VARIANCE: np.float32([-0.75, -0.2500001])})
    assert after[VARIANCE].tolist() == [0.25, 0.0]
    assert after["0.weight"].tolist() == [3.0]


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_running_statistics_are_the_mean_of_the_hospitals_own_under_every_server_optimiser(
    bn_study: Callable[..., Study], tmp_path: Path, strategy: str
) -> None:
    models, here = trained(bn_study(strategy=strategy), tmp_path)
    for number in range(1, len(models)):
        sent = here.changes[number + 1]
        for name in (MEAN, VARIANCE):
            # 6, 8 and 12 training cases.
            mean = sum(n * sent[site][name] for site, n in SIZES.items()) / 26
            expected = models[number - 1][name] + mean
            assert models[number][name] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert (models[number][VARIANCE] > 0).all()


def test_the_length_of_an_update_is_that_of_its_parameters(
    bn_study: Callable[..., Study], tmp_path: Path
) -> None:
    """Bright pictures move running statistics far, which is no fault of the hospital."""
    study = bn_study(norm_limit=3.0)
    models, here = trained(study, tmp_path)
    first = here.changes[1]
    lengths = {s: float(np.sqrt(sum((a**2).sum() for a in first[s].values()))) for s in first}
    assert lengths["c"] > 3 * np.median(list(lengths.values()))
    mean = sum(n * first[site][VARIANCE] for site, n in SIZES.items()) / 26
    assert models[0][VARIANCE] == pytest.approx(1 + mean, rel=1e-5)


def test_under_a_robust_rule_one_hospital_does_not_decide_the_running_statistics(
    bn_study: Callable[..., Study], tmp_path: Path
) -> None:
    models, here = trained(bn_study(strategy="norm_clipping", min_sites=3), tmp_path)
    middle = np.median([here.changes[1][site][MEAN] for site in SIZES], axis=0)
    assert models[0][MEAN] == pytest.approx(middle, rel=1e-5)


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("secure_aggregation", SecureAggregation(range=2.0)),
        ("site_privacy", SiteLevelPrivacy(epsilon=5.0, delta=1e-5, clip=1.0, sites=3)),
    ],
)
def test_running_statistics_are_refused_where_every_number_needs_a_bound(
    bn_study: Callable[..., Study], tmp_path: Path, table: str, value: Any
) -> None:
    study = replace(bn_study(weighting="equal"), **{table: value})
    with pytest.raises(ConfigError, match=rf"{table}: .*1\.running_mean.*\"group\""):
        run_study(study, Pictures(study, tmp_path), seed=1)
