"""A hospital's answers to the coordinator: it knows its cohort and its policy, and no transport.

prepare  training cases -> counts and sums
round    received weights -> validation metrics; then training -> delta
finish   kept weights -> metrics; the scores of single cases stay in the hospital's folder
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medfl.client.data.cases import Cohort
from medfl.client.encoding import case_set, local_statistics
from medfl.client.examples import Gallery
from medfl.client.training.caseset import CaseSet
from medfl.client.training.plan import DpPlan, TrainPlan
from medfl.common import accounting, tensors
from medfl.common.errors import DataError, FederationError, PolicyRefused
from medfl.common.messages import PARTS, Instruction, Metrics, Part, Reply
from medfl.common.metrics import default_metrics, needs_distances, summarise
from medfl.common.metrics.scores import Scores, score_classification, score_masks
from medfl.common.records import columns
from medfl.common.seeds import derive
from medfl.common.site import Policy, SitePrivacy
from medfl.common.statistics import Shared, shared_from_plain, statistics_to_plain
from medfl.common.study import Study
from medfl.common.tensors import Array, Tensors
from medfl.strategies.catalogue import strategy_for
from medfl.strategies.strategy import Local

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

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


def answer(hospital: Hospital, asked: Instruction) -> Reply:
    """Do what is asked, if the hospital's study and policy allow it.

    Raises:
        PolicyRefused: another study, a task that the policy forbids, or too few cases.
        MedflError: what else keeps this hospital from answering.
    """
    if asked.study_digest != hospital.study.digest:
        raise PolicyRefused(
            "The coordinator speaks of another study than the one this hospital holds. "
            "Compare the digests on both sides and approve the new study if it is right."
        )
    if hospital.study.task.kind not in hospital.policy.tasks:
        raise PolicyRefused(
            f"policy.tasks of this site does not have {hospital.study.task.kind!r}. "
            "Add it if the hospital wants to take part."
        )
    started = time.monotonic()
    reply = _ANSWERS[asked.kind](hospital, asked)
    return replace(
        reply,
        round=asked.round,
        seconds=time.monotonic() - started,
        cohort=hospital.cohort.digest,
        metrics=_rounded(reply.metrics, hospital.policy.round_metrics_to),
    )


def privacy_of(study: Study, site: SitePrivacy | None) -> SitePrivacy | None:
    """The stricter of what the study and the hospital ask for; None where neither asks."""
    asked = study.privacy
    if asked is None:
        return site
    if site is None:
        return SitePrivacy(epsilon=asked.epsilon, delta=asked.delta, clip=asked.clip)
    return SitePrivacy(
        epsilon=min(asked.epsilon, site.epsilon),
        delta=min(asked.delta, site.delta),
        clip=asked.clip,
    )


def _prepare(hospital: Hospital, asked: Instruction) -> Reply:
    cohort = hospital.cohort
    counts = _counts(cohort)
    if counts["train"] < max(1, hospital.policy.min_cases):
        raise PolicyRefused(
            f"{counts['train']} training cases, and this site's policy asks for at least "
            f"{hospital.policy.min_cases}. Nothing was sent."
        )
    private = privacy_of(hospital.study, hospital.privacy) is not None
    left_out: dict[str, int] = {}
    for case in cohort.quarantined:
        left_out[case.reason] = left_out.get(case.reason, 0) + 1
    return Reply(
        site=hospital.name,
        n_cases=counts["train"],
        counts=counts,
        left_out=left_out,
        statistics=statistics_to_plain(local_statistics(hospital.study, cohort, private=private)),
    )


def _round(hospital: Hospital, asked: Instruction) -> Reply:
    from medfl.client.training.loop import train

    study, shared = hospital.study, shared_from_plain(asked.shared)
    model = _model(hospital, asked, shared)
    home = _home_names(model, hospital.local)
    _enter(hospital, model, asked, home, asked.round - 1)
    metrics = {part: _evaluate(hospital, model, shared, asked, part) for part in asked.parts}
    _prune(hospital, asked)
    cases = case_set(study, shared, hospital.cohort, "train")
    plan, history = _plan(hospital, asked, len(cases))
    own_control = _own_control(hospital, asked)
    if hospital.local.proximal_mu:
        plan = replace(plan, penalty=proximal(hospital.local.proximal_mu))
    if own_control is not None:
        plan = replace(plan, correction=_torch(tensors.subtract(asked.control, own_control)))
    before = _weights(model)
    outcome = train(model, cases, study, shared, plan)
    delta = tensors.subtract(_weights(model), before)
    control: Tensors = {}
    if own_control is not None:
        control = _control_change(
            own_control, asked.control, delta, outcome.steps, outcome.learning_rate
        )
        tensors.save(tensors.add(own_control, control), _control_file(hospital))
    if home:
        after = _weights(model)
        tensors.save({n: after[n] for n in home}, _home_file(hospital, asked.round))
    spent = _spend(hospital, history, plan.dp, outcome.steps)
    return Reply(
        site=hospital.name,
        n_cases=len(cases),
        steps=outcome.steps,
        loss=outcome.loss,
        epsilon=None if spent is None else spent[0],
        target_delta=None if spent is None else spent[1],
        metrics=metrics,
        delta={n: a.astype(np.float32) for n, a in delta.items() if n not in home},
        control={n: a.astype(np.float32) for n, a in control.items()},
    )


def _finish(hospital: Hospital, asked: Instruction) -> Reply:
    shared = shared_from_plain(asked.shared)
    model = _model(hospital, asked, shared)
    home = _home_names(model, hospital.local)
    _enter(hospital, model, asked, home, asked.round)
    cohort = hospital.cohort
    spent = _spend(hospital, _history(hospital), None, 0)
    return Reply(
        site=hospital.name,
        metrics={
            part: _evaluate(hospital, model, shared, asked, part, final=part == "test")
            for part in asked.parts
        },
        counts=_counts(cohort),
        epsilon=None if spent is None else spent[0],
        target_delta=None if spent is None else spent[1],
    )


_ANSWERS: Mapping[str, Callable[[Hospital, Instruction], Reply]] = {
    "prepare": _prepare,
    "round": _round,
    "finish": _finish,
}


def proximal(mu: float) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]:
    """mu/2 ||w - w_global||^2 (Li et al. 2020, eq. 2), differentiable in w."""

    def penalty(own: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Tensor:
        import torch

        squares = [torch.sum((w - received[name]) ** 2) for name, w in own.items()]
        return 0.5 * mu * torch.stack(squares).sum()

    return penalty


def _control_change(
    own: Tensors, server: Tensors, delta: Tensors, steps: int, learning_rate: float
) -> dict[str, Array]:
    """c_i+ - c_i = -c + (x - y_i) / (K eta): Karimireddy et al. 2020, Algorithm 1, option II."""
    scale = 1.0 / max(steps * learning_rate, 1e-12)
    return {n: -server[n] - scale * delta[n] for n in own}


def _evaluate(
    hospital: Hospital,
    model: nn.Module,
    shared: Shared,
    asked: Instruction,
    part: Part,
    final: bool = False,
) -> Metrics:
    """Metrics of one part; the final ones also leave scores and examples in the site's folder."""
    study = hospital.study
    cases = case_set(study, shared, hospital.cohort, part)
    names = tuple(study.evaluation.metrics or default_metrics(study.task))
    if not final:
        # Metrics that need surfaces are worth their time once, at the end.
        names = tuple(n for n in names if not needs_distances([n]))
    if not len(cases):
        return dict.fromkeys(names, None)
    gallery = Gallery(study) if final and study.image is not None else None
    scores = score(
        model,
        cases,
        study,
        hospital.device,
        distances=needs_distances(names),
        gallery=gallery,
    )
    if final:
        scores.save(hospital.folder / "scores.npz")
    if gallery is not None:
        gallery.save(hospital.folder / "examples.npz")
    return summarise(study.task, scores, names)


def score(
    model: nn.Module,
    cases: CaseSet,
    study: Study,
    device: str,
    *,
    distances: bool,
    gallery: Gallery | None = None,
) -> Scores:
    """What the model does on these cases, case by case."""
    from medfl.client.training.predict import predict

    batches = predict(model, cases, study, device)
    if study.task.kind == "segmentation":
        predictions = (np.asarray(mask) for batch in batches for mask in batch)
        masks = (np.asarray(cases.targets[i], dtype=np.uint8) for i in range(len(cases)))
        shown = gallery.watch(cases, predictions) if gallery is not None else predictions
        spacing = study.image.spacing_mm if study.image is not None else None
        spacings = None if spacing is None else [tuple(spacing)] * len(cases)
        return score_masks(
            cases.keys, cases.patients, masks, shown, study.task.classes, spacings, distances
        )
    probability = np.concatenate([np.asarray(batch) for batch in batches])
    if gallery is not None:
        gallery.choose(cases, probability)
    return score_classification(cases.keys, cases.patients, np.asarray(cases.targets), probability)


def _plan(
    hospital: Hospital, asked: Instruction, n_cases: int
) -> tuple[TrainPlan, list[tuple[float, float, int]]]:
    """How this round trains here, and what privacy earlier rounds of this run have spent."""
    from medfl.client.training.schedule import private_steps_in_round, sample_rate_for

    study = hospital.study
    plan = TrainPlan(
        round=asked.round,
        rounds=study.federation.rounds,
        seed=derive(asked.seed, "site", hospital.name, hospital.secret, "round", asked.round),
        device=hospital.device,
    )
    privacy = privacy_of(study, hospital.privacy)
    if privacy is None:
        return plan, []
    rate = sample_rate_for(study, n_cases)
    steps = private_steps_in_round(study, rate) * study.federation.rounds
    noise = accounting.noise_multiplier_for(privacy.epsilon, privacy.delta, rate, steps)
    dp = DpPlan(noise_multiplier=noise, sample_rate=rate, clip=privacy.clip)
    return replace(plan, dp=dp), _history(hospital)


def _spend(
    hospital: Hospital,
    history: list[tuple[float, float, int]],
    dp: DpPlan | None,
    steps: int,
) -> tuple[float, float] | None:
    """Write down the steps taken and return (epsilon, delta) of the run so far."""
    privacy = privacy_of(hospital.study, hospital.privacy)
    if privacy is None:
        return None
    if dp is not None:
        history = [*history, (dp.noise_multiplier, dp.sample_rate, steps)]
        content = json.dumps(history).encode()
        tensors.write_atomic(hospital.state / "privacy.json", content)
    return accounting.epsilon(tuple(history), privacy.delta), privacy.delta


def _history(hospital: Hospital) -> list[tuple[float, float, int]]:
    file = hospital.state / "privacy.json"
    if not file.exists():
        return []
    return [(float(n), float(q), int(t)) for n, q, t in json.loads(file.read_text())]


def _counts(cohort: Cohort) -> dict[Part, int]:
    return {part: len(cohort.positions(part)) for part in PARTS}


def _model(hospital: Hospital, asked: Instruction, shared: Shared) -> nn.Module:
    """The study's network on the hospital's device; its weights are whatever it had before.

    Building one takes longer than a round of a small site, so the last ones built are kept.
    """
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


def _enter(
    hospital: Hospital, model: nn.Module, asked: Instruction, home: frozenset[str], round_: int
) -> None:
    """Put the received weights into the model, and this site's own layers of `round_` over them."""
    from medfl.common.models.weights import set_weights

    weights = dict(asked.weights)
    if home and round_ > 0:
        file = _home_file(hospital, round_)
        if not file.exists():
            # A site that was not drawn in that round goes on from its latest layers.
            file = _latest_home(hospital)
        if file.exists():
            weights.update(tensors.load(file))
    set_weights(model, weights)


def _home_names(model: nn.Module, local: Local) -> frozenset[str]:
    """Names of the parameters and buffers that never leave this hospital."""
    if local.keeps == "nothing":
        return frozenset()
    if local.keeps == "everything":
        return frozenset(model.state_dict())
    from medfl.common.models.norms import normalisation_names

    names = frozenset(normalisation_names(model))
    if not names:
        raise FederationError(
            "federation.strategy: this strategy keeps normalisation layers at the hospital, and "
            "the model has none with parameters. Choose a norm with parameters in model.options."
        )
    return names


def _home_file(hospital: Hospital, round_: int) -> Path:
    return hospital.state / f"home_{round_:05d}.safetensors"


def _latest_home(hospital: Hospital) -> Path:
    files = sorted(hospital.state.glob("home_*.safetensors"))
    return files[-1] if files else _home_file(hospital, 0)


def _prune(hospital: Hospital, asked: Instruction) -> None:
    """Layers at home are kept of the best round and the latest one."""
    keep = {_home_file(hospital, asked.best_round), _latest_home(hospital)}
    for file in hospital.state.glob("home_*.safetensors"):
        if file not in keep:
            file.unlink()


def _control_file(hospital: Hospital) -> Path:
    return hospital.state / "control.safetensors"


def _own_control(hospital: Hospital, asked: Instruction) -> dict[str, Array] | None:
    """This site's control variate; zeros before its first round; None where none is asked for."""
    if not hospital.local.control_variates:
        return None
    if not asked.control:
        raise DataError("The strategy needs a control variate and the coordinator sent none.")
    file = _control_file(hospital)
    if file.exists():
        return tensors.load(file)
    return {n: np.zeros_like(a) for n, a in asked.control.items()}


def _rounded(metrics: Mapping[Part, Metrics], decimals: int) -> dict[Part, Metrics]:
    return {
        part: {n: None if v is None else round(v, decimals) for n, v in values.items()}
        for part, values in metrics.items()
    }
