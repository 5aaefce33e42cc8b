"""A hospital's answers to the coordinator: it knows its cohort and its policy, and no transport.

prepare  training cases -> counts and sums
round    received weights -> validation metrics; then training -> delta
finish   kept weights -> metrics; the scores of single cases stay in the hospital's folder
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medfl.client import budget, foreseen, home, private_site, secure_site, told_sums
from medfl.client.book import Book
from medfl.client.data.cases import Cohort
from medfl.client.encoding import case_set, local_statistics
from medfl.client.evaluate import evaluate, rounded
from medfl.client.ledger import Entry, Ledger
from medfl.client.outgoing import outgoing
from medfl.client.released import withheld
from medfl.client.secure_site import Identity
from medfl.client.small_counts import fewest_of_a_class, holders, without_small
from medfl.client.training.plan import TrainPlan
from medfl.common import tensors
from medfl.common.errors import PolicyRefused
from medfl.common.messages import Instruction, Metrics, Part, Reply, pack
from medfl.common.metrics import OF_CLASSES
from medfl.common.packing import pack_exactly
from medfl.common.records import columns
from medfl.common.seeds import derive
from medfl.common.site import Policy, SitePrivacy
from medfl.common.statistics import Shared, shared_from_plain, statistics_to_plain
from medfl.common.study import Study
from medfl.common.tensors import Array, Tensors
from medfl.common.unlike import unlike_all
from medfl.strategies.catalogue import strategy_for
from medfl.strategies.home import home_names
from medfl.strategies.strategy import Local

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

# Networks built here before; building one takes longer than a round of a small site.
_built: dict[tuple[str, int | None, bool, str], nn.Module] = {}


@dataclass(frozen=True)
class Hospital:
    """One site of one study.

    load_cohort: reads the cohort (from the cache where there is one); called once.
    folder: where this site keeps its own state and results of one run; never sent anywhere.
    simulated: of public or made-up data, and to be repeated: noise comes from the run's seed,
        cases are counted, and the ledger begins with the run. Elsewhere noise has no seed.
    ledger_folder: where a real hospital's ledger lies, the same for all studies; sums_file: what
        sums it has told of whom, likewise.
    identity: signs the keys of secure sums and knows the others'; a simulation makes its own.
    book, approval: which questions are answered, and what they are asked under; a simulation, whose
        coordinator is one's own, has no book.
    note_unlike: is told at round 1 which fields are far from the other hospitals'.
    said: the last answer of a real hospital, by what was asked. masked: the last one to a step of a
        secure sum, by the whole question.
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
    sums_file: Path | None = None
    identity: Identity | None = field(default=None, repr=False)
    book: Book | None = None
    note_unlike: Callable[[tuple[str, ...]], None] = field(default=lambda fields: None, repr=False)
    approval: Callable[[], str] = field(default=lambda: "", repr=False)
    said: dict[str, Reply] = field(default_factory=dict, repr=False)
    masked: dict[str, Reply] = field(default_factory=dict, repr=False)

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

    @property
    def smallest_count(self) -> int:
        """Fewer patients than this are not spoken of; public data have no such limit."""
        return 0 if self.simulated else self.policy.smallest_count

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

    The same question about the same model gets the same answer: a coordinator that died before it
    kept the answer asks again, and that costs neither time nor privacy. In a secure sum it comes
    under new masks where a new attempt has new keys, and bit for bit where nothing has changed: the
    answer was lost on its way.

    Raises:
        PolicyRefused: another study, something that the policy or its privacy forbids, or a
            question that no run can need (`medfl.client.book`).
        BudgetSpent: the privacy budget does not allow another round.
        MedflError: what else keeps this hospital from answering.
    """
    started = time.monotonic()
    _refuse_forbidden(hospital, asked)
    if hospital.book is not None:
        hospital.book.admit(asked, hospital.approval())
        home.begin_run(hospital.folder, asked.run)
    if hospital.study.secure_aggregation is None or hospital.simulated:
        return _answered(hospital, asked, started)
    whole = pack(asked).about
    if whole not in hospital.masked:
        reply = _answered(hospital, asked, started)
        hospital.masked.clear()
        hospital.masked[whole] = reply
    return hospital.masked[whole]


def _answered(hospital: Hospital, asked: Instruction, started: float) -> Reply:
    if asked.kind == "round":
        secure_site.expect(hospital, asked)
    question = "" if hospital.simulated else pack(replace(asked, attempt=0, secure={})).about
    if question in hospital.said:
        return secure_site.masked(hospital, asked, hospital.said[question])
    reply = _ANSWERS[asked.kind](hospital, asked)
    reply = replace(
        reply,
        round=asked.round,
        # A private hospital's depend on who was drawn; to the network they show as they are.
        seconds=time.monotonic() - started if hospital.terms is None else 0.0,
        cohort=hospital.cohort.digest if hospital.terms is None else "",
        metrics=rounded(reply.metrics, hospital.policy.round_metrics_to),
        loss=_told_loss(hospital, reply.loss),
    )
    if asked.model and not hospital.simulated:
        hospital.said.clear()
        hospital.said[question] = reply
    return secure_site.masked(hospital, asked, reply)


def _told_loss(hospital: Hospital, loss: float | None) -> float | None:
    """The training loss is a metric too: rounded as they are, and not said under masks."""
    if loss is None or hospital.study.secure_aggregation is not None:
        return None
    return round(loss, hospital.policy.round_metrics_to)


def _refuse_forbidden(hospital: Hospital, asked: Instruction) -> None:
    """Whatever is asked, in whatever order: nobody has to ask for `prepare` first."""
    study, policy = hospital.study, hospital.policy
    if asked.study_digest != study.digest:
        raise PolicyRefused(
            "The coordinator speaks of another study than the one this hospital holds. "
            "Compare the digests on both sides and approve the new study if it is right."
        )
    for why in foreseen.by_policy(study, policy, hospital.terms):
        raise PolicyRefused(why)
    if hospital.terms is not None and "train" in asked.parts:
        raise PolicyRefused(
            "The coordinator asks for metrics of the training cases, which no noise protects."
        )
    if policy.evaluate_only and asked.kind not in ("prepare", "finish"):
        raise PolicyRefused(
            "This hospital only evaluates (policy.evaluate_only of site.toml), and the coordinator "
            f"asks it to train ({asked.kind}). Nothing was sent."
        )
    patients = hospital.patients(foreseen.taking_part(policy))
    for why in foreseen.by_size(policy, hospital.smallest_count, patients, hospital.terms):
        raise PolicyRefused(f"{why} Nothing was sent.")


def _prepare(hospital: Hospital, asked: Instruction) -> Reply:
    study, cohort, terms = hospital.study, hospital.cohort, hospital.terms
    if hospital.policy.evaluate_only:
        return replace(_described(hospital), evaluates=True)
    statistics = local_statistics(study, cohort, private=terms is not None)
    if terms is None:
        patients = hospital.patients("train")
        statistics = without_small(
            statistics, study, hospital.smallest_count, holders(study, cohort, patients)
        )
        if not hospital.simulated:
            file = hospital.sums_file or hospital.folder / "sums-told.jsonl"
            told_sums.tell(file, study, cohort, statistics, hospital.smallest_count)
    else:
        uses = budget.whole_study(study, terms, asked.run, hospital.patients)
        budget.refuse_too_much(hospital.ledger, terms, uses)
        private_site.note_cohort(hospital)
        statistics = replace(statistics, n_cases=terms.n_cases or 1)
    return replace(
        _described(hospital),
        n_cases=statistics.n_cases,
        statistics=statistics_to_plain(statistics),
    )


def _round(hospital: Hospital, asked: Instruction) -> Reply:
    from medfl.client.training.loop import train

    study, shared = hospital.study, shared_from_plain(asked.shared)
    _tell_unlike(hospital, asked, shared)
    model, before = _received(hospital, asked, shared, asked.round - 1)
    metrics = _evaluated(hospital, asked, model, shared)
    cases = case_set(study, shared, hospital.cohort, "train")
    own_control: dict[str, Array] = {}
    if hospital.local.control_variates:
        own_control = home.control_before(hospital.state, asked.round, asked.control)
    plan, entry = _plan(hospital, asked, cases.patients)
    plan = replace(plan, correction=_torch(tensors.subtract(asked.control, own_control)) or None)
    outcome = train(model, cases, study, shared, plan)
    if entry is not None:
        hospital.ledger.settle(entry)
    if outcome.clip is not None:
        home.bound(hospital.state).save(asked.round, {"clip": np.array(outcome.clip)})
    after = _weights(model)
    delta = tensors.subtract(after, before)
    control = home.control_change(
        own_control, asked.control, delta, outcome.steps * outcome.learning_rate
    )
    if own_control:
        home.control(hospital.state).save(asked.round, tensors.add(own_control, control))
    stays = home_names(model, hospital.local)
    if stays:
        layers = {n: a for n, a in after.items() if n in stays}
        home.layers(hospital.state).save(asked.round, layers, also=asked.best_round)
    sent_delta, sent_control = _leaving(
        hospital,
        asked,
        {n: a.astype(np.float32, copy=False) for n, a in delta.items() if n not in stays},
        {n: a for n, a in control.items() if n not in stays},
    )
    reply = Reply(
        site=hospital.name,
        n_cases=len(cases) if hospital.terms is None else hospital.terms.n_cases or 1,
        steps=outcome.steps,
        loss=outcome.loss,
        metrics=metrics,
        delta=sent_delta,
        control=sent_control,
    )
    return _with_spent(hospital, reply)


def _tell_unlike(hospital: Hospital, asked: Instruction, shared: Shared) -> None:
    """Tell a real hospital, and nobody else, which of its fields are far from the others'."""
    if asked.round != 1 or hospital.simulated:
        return
    private = hospital.terms is not None
    fields = unlike_all(local_statistics(hospital.study, hospital.cohort, private=private), shared)
    for field_ in fields:
        log.warning("this hospital's data are unlike the others': %s", field_)
    hospital.note_unlike(fields)


def _leaving(
    hospital: Hospital, asked: Instruction, delta: Tensors, control: Tensors
) -> tuple[Tensors, Tensors]:
    """The update as it travels; in a secure sum as it is, because `secure_site` masks it last."""
    if hospital.study.secure_aggregation is not None:
        return delta, control
    kind = hospital.study.federation.updates
    return outgoing(hospital.state, asked.round, delta, kind), pack_exactly(control)


# A hospital's whole model where the strategy leaves layers with it, in its folder for the study.
OWN_MODEL = "model.safetensors"


def _finish(hospital: Hospital, asked: Instruction) -> Reply:
    shared = shared_from_plain(asked.shared)
    model, _ = _received(hospital, asked, shared, asked.round)
    metrics = _evaluated(hospital, asked, model, shared)
    if "test" in asked.parts and hospital.local.keeps != "nothing":
        # The published file lacks this site's layers; only here is what reached the figures.
        about = {"study": hospital.study.name, "run": asked.run, "site": hospital.name}
        tensors.save(_weights(model), hospital.folder / OWN_MODEL, about)
        (hospital.folder / OWN_MODEL).chmod(0o600)
    return _with_spent(hospital, replace(_described(hospital), metrics=metrics))


_ANSWERS: Mapping[str, Callable[[Hospital, Instruction], Reply]] = {
    "prepare": _prepare,
    "keys": secure_site.keys,
    "shares": secure_site.shares,
    "round": _round,
    "unmask": secure_site.unmask,
    "finish": _finish,
}


def _described(hospital: Hospital) -> Reply:
    """How many cases there are, and how many were left out for which reason; if that is open."""
    reply = Reply(site=hospital.name)
    if hospital.terms is not None:
        return reply
    counts = private_site.counted(hospital.cohort, hospital.smallest_count)
    return replace(reply, **counts)


def _with_spent(hospital: Hospital, reply: Reply) -> Reply:
    terms = hospital.terms
    if terms is None:
        return reply
    epsilon = budget.study_epsilon(hospital.ledger, hospital.study, terms)
    return replace(reply, epsilon=epsilon, target_delta=terms.delta)


def _plan(
    hospital: Hospital, asked: Instruction, patients: Sequence[str]
) -> tuple[TrainPlan, Entry | None]:
    """How this round trains here; with privacy, the round is charged now."""
    mu = hospital.local.proximal_mu
    plan = TrainPlan(
        round=asked.round,
        rounds=hospital.study.federation.rounds,
        seed=derive(
            asked.seed, "site", hospital.name, _run_part(hospital, asked), "round", asked.round
        ),
        device=hospital.device,
        penalty=proximal(mu) if mu else None,
    )
    if hospital.terms is None:
        return plan, None
    dp, entry = private_site.charged(hospital, hospital.terms, asked, patients)
    return replace(plan, dp=dp), entry


def _run_part(hospital: Hospital, asked: Instruction) -> str:
    """What of the run's name goes into the seed of training.

    Under masks all of it: two runs' sums over other hospitals are then sums of other updates. Else
    none, since the coordinator sees each update anyway; and none of "main", which simulations and
    the engine call the run that has no name, so that masks change no simulated result.
    """
    masked = hospital.study.secure_aggregation is not None
    return asked.run if masked and asked.run != "main" else ""


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
    """What leaves of the metrics asked for; the test part's cases also leave their scores here."""
    return {part: _evaluated_part(hospital, asked, model, shared, part) for part in asked.parts}


def _evaluated_part(
    hospital: Hospital, asked: Instruction, model: nn.Module, shared: Shared, part: Part
) -> Metrics:
    summary, entry = private_site.told(hospital, asked, part)
    if summary is withheld and part != "test":
        return {}
    metrics = evaluate(
        model,
        case_set(hospital.study, shared, hospital.cohort, part),
        hospital.study,
        hospital.device,
        keep=hospital.folder if part == "test" else None,
        summary=summary,
        durable=not hospital.simulated,
    )
    if entry is not None:
        hospital.ledger.settle(entry)
    few = len(set(hospital.patients(part))) < hospital.smallest_count
    # Whether priced metrics are there must not tell how many patients are: their noise covers few.
    if summary is withheld or (few and hospital.terms is None):
        return {}
    return (
        metrics if hospital.terms is not None else _without_shares_of_few(hospital, part, metrics)
    )


def _without_shares_of_few(hospital: Hospital, part: Part, metrics: Metrics) -> Metrics:
    """No share of a class that few patients of the part have; undefined, as where none has it."""
    study, places = hospital.study, hospital.cohort.positions(part)
    if study.task.kind == "segmentation" or not len(places):
        return metrics
    targets = np.asarray(hospital.cohort.targets)[places]
    fewest = fewest_of_a_class(study.task, targets, hospital.patients(part))
    if not 0 < fewest < hospital.smallest_count:
        return metrics
    return {name: None if name in OF_CLASSES else value for name, value in metrics.items()}


def _received(
    hospital: Hospital, asked: Instruction, shared: Shared, round_: int
) -> tuple[nn.Module, Tensors]:
    """The network with the received weights, and this site's own layers of `round_` over them; and
    these weights."""
    from medfl.common.models.weights import set_weights

    model = _model(hospital, asked, shared)
    weights = dict(asked.weights)
    if hospital.local.keeps != "nothing":
        weights.update(home.layers(hospital.state).as_of(round_))
    set_weights(model, weights)
    return model, weights


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
