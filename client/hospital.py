"""A hospital's answers to the coordinator: it knows its cohort and its policy, and no transport.

prepare  training cases -> counts and sums
round    received weights -> validation metrics; then training -> delta
finish   kept weights -> metrics; the scores of single cases stay in the hospital's folder
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medfl.client import budget, home
from medfl.client.data.cases import Cohort
from medfl.client.encoding import case_set, local_statistics
from medfl.client.evaluate import evaluate, rounded
from medfl.client.outgoing import outgoing
from medfl.client.training.plan import TrainPlan
from medfl.common import tensors
from medfl.common.errors import PolicyRefused
from medfl.common.messages import PARTS, Instruction, Metrics, Part, Reply
from medfl.common.packing import pack_exactly
from medfl.common.records import columns
from medfl.common.seeds import derive
from medfl.common.site import Policy, SitePrivacy
from medfl.common.statistics import Shared, shared_from_plain, statistics_to_plain
from medfl.common.study import Study
from medfl.common.tensors import Array, Tensors
from medfl.strategies.catalogue import strategy_for
from medfl.strategies.home import home_names
from medfl.strategies.strategy import Local

if TYPE_CHECKING:
    from torch import Tensor, nn

# Networks built here before; building one takes longer than a round of a small site.
_built: dict[tuple[str, int | None, bool, str], nn.Module] = {}


@dataclass(frozen=True)
class Hospital:
    """One site of one study.

    load_cohort: reads the cohort (from the cache where there is one); called once.
    folder: where this site keeps its own state and results of one run; never sent anywhere.
    secret: part of every seed here. Whoever knows the seeds can subtract the noise of differential
        privacy, so a real hospital draws it at random; a simulation leaves it empty to be repeated.
    """

    name: str
    study: Study
    load_cohort: Callable[[], Cohort]
    folder: Path
    policy: Policy = field(default_factory=Policy)
    privacy: SitePrivacy | None = None
    device: str = "cpu"
    secret: str = ""

    @cached_property
    def cohort(self) -> Cohort:
        """The checked cases, read at the first question about them."""
        return self.load_cohort()

    @cached_property
    def local(self) -> Local:
        """What the study's strategy asks of training here."""
        return strategy_for(self.study).local

    @property
    def state(self) -> Path:
        """Folder of what this site keeps between rounds."""
        return self.folder / "state"

    @cached_property
    def spends(self) -> SitePrivacy | None:
        """The privacy that this site trains under, None without it."""
        return budget.privacy_of(self.study, self.privacy)


def answer(hospital: Hospital, asked: Instruction) -> Reply:
    """Do what is asked, if the hospital's study and policy allow it.

    Raises:
        PolicyRefused: another study, or something that the policy or its privacy forbids.
        BudgetSpent: the privacy budget does not allow another round.
        MedflError: what else keeps this hospital from answering.
    """
    started = time.monotonic()
    _refuse_forbidden(hospital, asked)
    reply = _ANSWERS[asked.kind](hospital, asked)
    return replace(
        reply,
        round=asked.round,
        seconds=time.monotonic() - started,
        cohort=hospital.cohort.digest,
        metrics=rounded(reply.metrics, hospital.policy.round_metrics_to),
    )


def _refuse_forbidden(hospital: Hospital, asked: Instruction) -> None:
    """Whatever is asked, in whatever order: nobody has to ask for `prepare` first."""
    study, policy = hospital.study, hospital.policy
    if asked.study_digest != study.digest:
        raise PolicyRefused(
            "The coordinator speaks of another study than the one this hospital holds. "
            "Compare the digests on both sides and approve the new study if it is right."
        )
    if study.task.kind not in policy.tasks:
        raise PolicyRefused(
            f"policy.tasks of this site does not have {study.task.kind!r}. "
            "Add it if the hospital wants to take part."
        )
    if hospital.spends is not None:
        budget.refuse_unprotected(study)
        if "train" in asked.parts:
            raise PolicyRefused(
                "The coordinator asks for metrics of the training cases, which no noise protects."
            )
    n_cases = len(hospital.cohort.positions("train"))
    if n_cases < policy.min_cases:
        raise PolicyRefused(
            f"{n_cases} training cases, and this site's policy asks for at least "
            f"{policy.min_cases}. Nothing was sent."
        )


def _prepare(hospital: Hospital, asked: Instruction) -> Reply:
    private = hospital.spends is not None
    statistics = local_statistics(hospital.study, hospital.cohort, private=private)
    return replace(
        _described(hospital),
        n_cases=statistics.n_cases,
        statistics=statistics_to_plain(statistics),
    )


def _round(hospital: Hospital, asked: Instruction) -> Reply:
    from medfl.client.training.loop import train

    study, shared = hospital.study, shared_from_plain(asked.shared)
    model = _received(hospital, asked, shared, asked.round - 1)
    metrics = _evaluated(hospital, asked, model, shared)
    cases = case_set(study, shared, hospital.cohort, "train")
    own_control = (
        home.load_control(hospital.state, asked.control) if hospital.local.control_variates else {}
    )
    plan = _plan(hospital, asked, len(cases))
    plan = replace(plan, correction=_torch(tensors.subtract(asked.control, own_control)) or None)
    before = _weights(model)
    outcome = train(model, cases, study, shared, plan)
    after = _weights(model)
    delta = tensors.subtract(after, before)
    control = home.control_change(
        own_control, asked.control, delta, outcome.steps * outcome.learning_rate
    )
    if own_control:
        home.save_control(hospital.state, tensors.add(own_control, control))
    stays = home_names(model, hospital.local)
    if stays:
        layers = {n: a for n, a in after.items() if n in stays}
        home.save_layers(hospital.state, asked.round, layers, asked.best_round)
    reply = Reply(
        site=hospital.name,
        n_cases=len(cases),
        steps=outcome.steps,
        loss=outcome.loss,
        metrics=metrics,
        delta=outgoing(
            hospital.state,
            asked.round,
            {n: a.astype(np.float32) for n, a in delta.items() if n not in stays},
            study.federation.updates,
        ),
        control=pack_exactly({n: a for n, a in control.items() if n not in stays}),
    )
    return _with_spent(hospital, reply)


def _finish(hospital: Hospital, asked: Instruction) -> Reply:
    shared = shared_from_plain(asked.shared)
    model = _received(hospital, asked, shared, asked.round)
    metrics = _evaluated(hospital, asked, model, shared)
    return _with_spent(hospital, replace(_described(hospital), metrics=metrics))


_ANSWERS: Mapping[str, Callable[[Hospital, Instruction], Reply]] = {
    "prepare": _prepare,
    "round": _round,
    "finish": _finish,
}


def _described(hospital: Hospital) -> Reply:
    """How many cases there are, and how many were left out for which reason."""
    cohort = hospital.cohort
    return Reply(
        site=hospital.name,
        counts={part: len(cohort.positions(part)) for part in PARTS},
        left_out=dict(Counter(case.reason for case in cohort.quarantined)),
    )


def _with_spent(hospital: Hospital, reply: Reply) -> Reply:
    privacy = hospital.spends
    if privacy is None:
        return reply
    return replace(reply, epsilon=budget.spent(hospital.state, privacy), target_delta=privacy.delta)


def _plan(hospital: Hospital, asked: Instruction, n_cases: int) -> TrainPlan:
    """How this round trains here; with privacy, the round is charged now."""
    study, privacy, mu = hospital.study, hospital.spends, hospital.local.proximal_mu
    purpose: list[str | int] = ["site", hospital.name, hospital.secret, "round", asked.round]
    dp = None
    if privacy is not None and n_cases:
        dp, steps = budget.dp_plan(study, privacy, n_cases)
        # The same noise twice would cancel out in the difference of two answers.
        purpose += ["begun", budget.reserve(hospital.state, privacy, dp, steps)]
    return TrainPlan(
        round=asked.round,
        rounds=study.federation.rounds,
        seed=derive(asked.seed, *purpose),
        device=hospital.device,
        dp=dp,
        penalty=proximal(mu) if mu else None,
    )


def proximal(mu: float) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]:
    """mu/2 ||w - w_global||^2 (Li et al. 2020, eq. 2), differentiable in w."""

    def penalty(own: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Tensor:
        import torch

        squares = [torch.sum((w - received[name]) ** 2) for name, w in own.items()]
        return 0.5 * mu * torch.stack(squares).sum()

    return penalty


def _evaluated(
    hospital: Hospital, asked: Instruction, model: nn.Module, shared: Shared
) -> dict[Part, Metrics]:
    """Metrics of the parts asked for; the test part's cases also leave their scores here."""
    return {
        part: evaluate(
            model,
            case_set(hospital.study, shared, hospital.cohort, part),
            hospital.study,
            hospital.device,
            keep=hospital.folder if part == "test" else None,
        )
        for part in asked.parts
    }


def _received(hospital: Hospital, asked: Instruction, shared: Shared, round_: int) -> nn.Module:
    """The network with the received weights, and this site's own layers of `round_` over them."""
    from medfl.common.models.weights import set_weights

    model = _model(hospital, asked, shared)
    weights = dict(asked.weights)
    if hospital.local.keeps != "nothing":
        weights.update(home.load_layers(hospital.state, round_))
    set_weights(model, weights)
    return model


def _model(hospital: Hospital, asked: Instruction, shared: Shared) -> nn.Module:
    """The study's network on the hospital's device; its weights are whatever it had before."""
    from medfl.common.models import build_model

    study = hospital.study
    n_features = len(columns(study.record, shared)) if study.record is not None else None
    key = (study.digest, n_features, shared.private, hospital.device)
    if key not in _built:
        model = build_model(
            study, shared, n_features=n_features, seed=derive(asked.seed, "weights")
        )
        _built[key] = model.to(hospital.device)
        while len(_built) > 4:
            _built.pop(next(iter(_built)))
    return _built[key]


def _weights(model: nn.Module) -> dict[str, Array]:
    from medfl.common.models.weights import get_weights

    return get_weights(model)


def _torch(arrays: Tensors) -> dict[str, Tensor]:
    import torch

    return {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}
