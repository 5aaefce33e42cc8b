"""One run from the queue to its end: quorum, rounds, model; or where it stands when it stopped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from medfl.common import study_text, tensors
from medfl.common.errors import FederationError, Interrupted, MedflError, StorageError
from medfl.common.receipts import Seen
from medfl.common.signing import public_of
from medfl.server import runs, studies
from medfl.server.ending import sentence
from medfl.server.report import federated
from medfl.strategies.catalogue import strategy_for
from medfl.strategies.home import published_part

if TYPE_CHECKING:
    from medfl.common.study import Study
    from medfl.common.tensors import Tensors
    from medfl.server.checkpoint import Checkpoint, Checkpoints
    from medfl.server.engine import Engine
    from medfl.server.federation import Federation
    from medfl.server.rounds import Earlier, Outcome, RoundRecord
    from medfl.server.runs import Run

log = logging.getLogger(__name__)

_LOOK_S = 0.5
# Until a disk that was full is tried again.
_FULL_DISK_S = 5.0


def work_off(
    federation: Federation,
    engine: Engine,
    run: Run,
    stopping: threading.Event,
    connect_s: float,
) -> None:
    """Do what a run asks for, and write down how it ended.

    connect_s: for those who have approved to connect, once there are enough.

    A run that the server's end interrupts stays as it is on disk: the next start takes it up.
    """
    from medfl.server.checkpoint import Checkpoints

    kept = Checkpoints(
        runs.folder_of(federation, run.id), federation.signing_key(), run.digest, run.id
    )
    try:
        _run(federation, engine, run, kept, stopping, connect_s)
        kept.drop()
    except Interrupted as error:
        if runs.is_to_stop(federation, run.id) or not stopping.is_set():
            _leave_so_far(federation, run)
            _end(federation, run, "stopped", error, stopping)
        else:
            log.warning("run=%s is interrupted; the next start goes on with it", run.id)
    except StorageError as error:
        _end(federation, run, "paused", error, stopping)
    except MedflError as error:
        _end(federation, run, "failed", error, stopping)


def _leave_so_far(federation: Federation, run: Run) -> None:
    from medfl.server import so_far

    try:
        so_far.leave(federation, run)
    except MedflError as error:
        log.error("run=%s: what it has done could not be written: %s", run.id, error)


def _end(
    federation: Federation,
    run: Run,
    state: runs.State,
    error: MedflError,
    stopping: threading.Event,
) -> None:
    """Write down how it ended, as soon as the disk takes it."""
    log.warning("run=%s %s: %s", run.id, state, error)
    why = f"{error} To go on: medfl-server resume {run.id}"
    while True:
        try:
            runs.end(federation, runs.load(federation, run.id), state, why, error.exit_code)
            return
        except StorageError as full:
            log.error("run=%s: that it is %s cannot be written yet: %s", run.id, state, full)
            if stopping.wait(_FULL_DISK_S):
                return


def _run(
    federation: Federation,
    engine: Engine,
    run: Run,
    kept: Checkpoints,
    stopping: threading.Event,
    connect_s: float,
) -> None:
    from medfl.server.admit import Door

    def check() -> None:
        if stopping.is_set():
            raise Interrupted("The server was stopped.")

    study = study_text.from_text(studies.find(federation, run.digest).study)
    last = kept.last() if run.attempt else None
    sites = _quorum(federation, engine, run, study, check, connect_s)
    apart = tuple(_missing(federation, run.digest, set(sites)))
    run = replace(run, state="running", sites=tuple(sites), missing=apart)
    runs.save(federation, run)
    federation.record("run started", run=run.id, study=run.digest, sites=sites, attempt=run.attempt)
    outcome = engine.run(
        study,
        seed=run.seed,
        run=run.id,
        deadline_s=run.deadline_s,
        only=lambda: studies.approvals(federation, run.digest),
        attempt=run.attempt,
        earlier=_earlier(federation, run, last),
        on_round=_note_rounds(federation, run, check),
        keep=_noting_refusals(federation, run, kept.keep),
        check=check,
        enough=lambda: runs.is_to_finish(federation, run.id),
        door=Door(
            federation,
            run.digest,
            run.id,
            Seen(runs.folder_of(federation, run.id) / "seen.jsonl"),
        ),
    )
    _finish(federation, run, study, outcome)


def _noting_refusals(
    federation: Federation, run: Run, keep: Callable[[Checkpoint], None]
) -> Callable[[Checkpoint], None]:
    """Keeps a checkpoint, and tells beside it which sites take no part now, and why."""

    def noting(checkpoint: Checkpoint) -> None:
        keep(checkpoint)
        refused = dict(sorted(checkpoint.prepared.refused.items()))
        known = {*checkpoint.prepared.roster, *checkpoint.prepared.evaluators, *refused}
        missing = (
            *_missing(federation, run.digest, known),
            *(f"{site} ({why})" for site, why in refused.items()),
        )
        now = runs.load(federation, run.id)
        if now.missing != missing:
            runs.save(federation, replace(now, missing=missing))

    return noting


def _earlier(federation: Federation, run: Run, last: Checkpoint | None) -> Earlier | None:
    """What was done before; a round whose checkpoint is there is told now if it was not then."""
    from medfl.server.rounds import Earlier

    if last is None:
        runs.forget(federation, run.id)
        return None
    told = [r.round for r in runs.progress(federation, run.id)]
    if last.record.round not in told:
        _record_round(federation, run, last.record)
    records = runs.rewind(federation, run.id, last.record)
    runs.save(federation, replace(runs.load(federation, run.id), round=last.record.round))
    log.warning("run=%s goes on after round %d", run.id, last.record.round)
    return Earlier(last, records)


def _quorum(
    federation: Federation,
    engine: Engine,
    run: Run,
    study: Study,
    check: Callable[[], None],
    connect_s: float,
) -> list[str]:
    """Sites that have approved and are connected, once they are all, or enough after `connect_s`.

    Raises:
        FederationError: they were not in time; the message names who is missing and why.
        Interrupted: somebody stopped the run or the server.
    """
    need, end = max(1, study.federation.min_sites), time.monotonic() + run.wait_s
    enough_since = time.monotonic()
    while True:
        decisions = studies.approvals(federation, run.digest)
        approved = set(decisions)
        there = approved & set(engine.roster.sites())
        # A hospital that only evaluates has approved no training case.
        training = {site for site in there if decisions[site].cases}
        missing = tuple(_missing(federation, run.digest, there))
        if len(training) < need:
            enough_since = time.monotonic()
        patient = time.monotonic() < min(end, enough_since + connect_s)
        if len(training) >= need and not (approved - there and patient):
            return sorted(there)
        if missing != run.missing:
            run = replace(run, missing=missing)
            runs.save(federation, run)
        if time.monotonic() >= end:
            raise FederationError(
                f"{len(training)} of the {need} sites that the study needs have approved it and "
                f"are connected. Missing: {'; '.join(missing) or 'nobody was invited'}."
            )
        check()
        _refuse_stopped(federation, run)
        time.sleep(_LOOK_S)


def _missing(federation: Federation, digest: str, there: set[str]) -> Iterator[str]:
    unsummed = studies.unsummed(federation, digest)
    for record in federation.sites():
        if record.name not in there and record.status == "active":
            decision = studies.decision_of(federation, digest, record.name)
            why = studies.refusal(federation, record, decision, digest)
            why = why or unsummed.get(record.name) or "not connected"
            yield f"{record.name} ({why})"


def _refuse_stopped(federation: Federation, run: Run) -> None:
    if runs.is_to_stop(federation, run.id):
        raise Interrupted("Stopped by a person.")


def _note_rounds(
    federation: Federation, run: Run, check: Callable[[], None]
) -> Callable[[RoundRecord, Tensors], None]:
    """What is kept of each round, and the place where a run can be stopped."""

    def note(record: RoundRecord, weights: Tensors) -> None:
        runs.add_round(federation, run.id, record)
        if not record.trained:
            return  # the last model's validation: the training is over
        _record_round(federation, run, record)
        now = runs.load(federation, run.id)
        joined = {str(s["name"]) for s in record.sites} - set(now.sites)
        if joined:
            federation.record("joined", run=run.id, round=record.round, sites=sorted(joined))
        sites = tuple(sorted({*now.sites, *joined}))
        runs.save(federation, replace(now, round=record.round, sites=sites))
        check()
        _refuse_stopped(federation, run)

    return note


def _record_round(federation: Federation, run: Run, record: RoundRecord) -> None:
    federation.record(
        "round void" if record.void else "round",
        run=run.id,
        round=record.round,
        sites=[s["name"] for s in record.sites],
        left_out=[f"{site}: {why}" for site, why in sorted(record.left_out.items())],
        model=record.model,
    )


def _finish(federation: Federation, run: Run, study: Study, outcome: Outcome) -> None:
    path = runs.folder_of(federation, run.id) / "model.safetensors"
    about = {
        "study": study.name,
        "study_digest": study.digest,
        "run": run.id,
        "coordinator": public_of(federation.signing_key()),
    }
    if part := published_part(strategy_for(study).local):
        about["holds"] = part
    tensors.save(outcome.weights, path, about)
    path.chmod(0o600)
    digest = runs.sha256(path)
    federation.record("model", run=run.id, sha256=digest, round=outcome.selected_round)
    done = replace(runs.load(federation, run.id), model=digest)
    runs.save(federation, done)
    federated.finish(federation, done, study, outcome)
    why = sentence(outcome.ending, study.federation) if outcome.ending is not None else ""
    runs.end(federation, done, "done", why, 0)
