"""A hospital's answers to the coordinator: it knows its cohort and its policy, and no transport.

prepare  training cases -> counts and sums
round    received weights -> validation metrics; then training -> delta
finish   kept weights -> metrics; the scores of single cases stay in the hospital's folder
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medfl.client import budget, released
from medfl.client.data.cases import Cohort
from medfl.client.encoding import case_set, local_statistics
from medfl.client.examples import Gallery
from medfl.client.ledger import Entry, Ledger
from medfl.client.noise import fresh_key, key_from
from medfl.client.training.caseset import CaseSet
from medfl.client.training.plan import TrainPlan
from medfl.common import tensors
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
    simulated: of public or made-up data, and to be repeated: noise comes from the run's seed, cases
        are counted, and the ledger begins with the run. A real hospital's noise has no seed.
    ledger_folder: where a real hospital's ledger lies, the same for all studies.
    """

    name: str
    study: Study
    load_cohort: Callable[[], Cohort]
    folder: Path
    policy: Policy = field(default_factory=Policy)
    privacy: SitePrivacy | None = None
    device: str = "cpu"
    simulated: bool = False
    ledger_folder: Path | None = None

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
    def terms(self) -> budget.Terms | None:
        """The privacy that this site works under, None without it."""
        terms = budget.terms_of(self.study, self.privacy)
        return budget.counted(terms, self.patients("train")) if terms and self.simulated else terms

    @property
    def ledger(self) -> Ledger:
        """What was spent of patients' privacy."""
        return Ledger(self.ledger_folder or self.state / "ledger")

    def patients(self, part: Part) -> list[str]:
        """The patient of each case of one part."""
        return [self.cohort.cases[i].patient for i in self.cohort.positions(part)]


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
        cohort="" if hospital.terms is not None else hospital.cohort.digest,
        metrics=_rounded(reply.metrics, hospital.policy.round_metrics_to),
    )


def _prepare(hospital: Hospital, asked: Instruction) -> Reply:
    cohort = hospital.cohort
    counts = _counts(cohort)
    if counts["train"] < max(1, hospital.policy.min_cases):
        raise PolicyRefused(
            f"{counts['train']} training cases, and this site's policy asks for at least "
            f"{hospital.policy.min_cases}. Nothing was sent."
        )
    if hospital.terms is not None:
        return _prepare_private(hospital, asked, hospital.terms)
    return Reply(
        site=hospital.name,
        n_cases=counts["train"],
        counts=counts,
        left_out=_left_out(cohort),
        statistics=statistics_to_plain(local_statistics(hospital.study, cohort, private=False)),
    )


def _prepare_private(hospital: Hospital, asked: Instruction, terms: budget.Terms) -> Reply:
    """Nothing but what is declared; refused here if the budget does not allow the whole study."""
    study, cohort = hospital.study, hospital.cohort
    budget.refuse_unprotected(study)
    uses = budget.whole_study(study, terms, asked.run, hospital.patients)
    budget.refuse_too_much(hospital.ledger, terms, uses)
    # For the hospital, and for a simulation's report: exact numbers do not leave.
    facts = {"counts": _counts(cohort), "left_out": _left_out(cohort), "digest": cohort.digest}
    tensors.write_atomic(hospital.folder / "cohort.json", json.dumps(facts).encode())
    statistics = local_statistics(study, cohort, private=True)
    n_cases = terms.n_cases or 1
    return Reply(
        site=hospital.name,
        n_cases=n_cases,
        statistics=statistics_to_plain(replace(statistics, n_cases=n_cases)),
    )


def _round(hospital: Hospital, asked: Instruction) -> Reply:
    from medfl.client.training.loop import train

    study, shared = hospital.study, shared_from_plain(asked.shared)
    model = _model(hospital, asked, shared)
    home = _home_names(model, hospital.local)
    _enter(hospital, model, asked, home, asked.round - 1)
    metrics = {part: _told(hospital, model, shared, asked, part) for part in asked.parts}
    _prune(hospital, asked)
    cases = case_set(study, shared, hospital.cohort, "train")
    plan, entry = _plan(hospital, asked, cases.patients)
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
    if entry is not None:
        hospital.ledger.settle(entry)
    spent, terms = _spent(hospital), hospital.terms
    return Reply(
        site=hospital.name,
        n_cases=len(cases) if terms is None else terms.n_cases or 1,
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
    spent = _spent(hospital)
    return Reply(
        site=hospital.name,
        metrics={
            part: _told(hospital, model, shared, asked, part, final=part == "test")
            for part in asked.parts
        },
        counts=_counts(cohort) if hospital.terms is None else {},
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


def _told(
    hospital: Hospital,
    model: nn.Module,
    shared: Shared,
    asked: Instruction,
    part: Part,
    final: bool = False,
) -> Metrics:
    """What leaves of one part's metrics: under privacy nothing, or noisy ones that are charged."""
    terms, study = hospital.terms, hospital.study
    if terms is None:
        return _evaluate(hospital, model, shared, part, summarise, final)
    if part == "train":
        raise PolicyRefused("Metrics of training cases are asked for, which no noise protects.")
    patients = hospital.patients(part)
    if terms.metrics_epsilon is None or not patients:
        if final:
            _evaluate(hospital, model, shared, part, released.withheld, final)
        return {}
    noise = budget.metrics_noise(study, terms)
    charge = budget.charge_for(study, asked.run, part, asked.round, (noise, 1.0, 1), "patient")
    entry = budget.reserve(hospital.ledger, terms, charge, patients)
    key = _key(hospital, asked, entry)
    told = _evaluate(hospital, model, shared, part, released.with_noise(noise, key), final)
    hospital.ledger.settle(entry)
    return told


def _key(hospital: Hospital, asked: Instruction, entry: Entry) -> bytes:
    """Of noise and sampling; in a simulation from the seed, and another for each use."""
    if not hospital.simulated:
        return fresh_key()
    return key_from(asked.seed, "site", hospital.name, "use", entry.number)


def _evaluate(
    hospital: Hospital,
    model: nn.Module,
    shared: Shared,
    part: Part,
    summary: released.Summary,
    final: bool,
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
    return summary(study.task, scores, names)


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
    hospital: Hospital, asked: Instruction, patients: Sequence[str]
) -> tuple[TrainPlan, Entry | None]:
    """How this round trains here; with privacy, the round is charged now."""
    study, terms = hospital.study, hospital.terms
    plan = TrainPlan(
        round=asked.round,
        rounds=study.federation.rounds,
        seed=derive(asked.seed, "site", hospital.name, "round", asked.round),
        device=hospital.device,
    )
    if terms is None:
        return plan, None
    dp, steps = budget.dp_plan(study, terms)
    step = (dp.noise_multiplier, dp.sample_rate, steps)
    charge = budget.charge_for(study, asked.run, "training", asked.round, step, terms.unit)
    entry = budget.reserve(hospital.ledger, terms, charge, patients)
    return replace(plan, dp=replace(dp, key=_key(hospital, asked, entry))), entry


def _spent(hospital: Hospital) -> tuple[float, float] | None:
    """(epsilon, delta) of this study's training so far, per its unit."""
    terms = hospital.terms
    if terms is None:
        return None
    return budget.study_epsilon(hospital.ledger, hospital.study, terms), terms.delta


def _left_out(cohort: Cohort) -> dict[str, int]:
    return dict(Counter(case.reason for case in cohort.quarantined))


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
