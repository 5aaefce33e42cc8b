"""`medfl-server start`: gateway, engine, and the runs one after another, until told to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from medfl.common import study_text, tensors
from medfl.common.errors import FederationError, Interrupted, MedflError
from medfl.common.private_files import only_one, private_folder, write_private
from medfl.common.receipts import Seen
from medfl.common.signing import public_of
from medfl.common.study import Study
from medfl.server import runs, studies
from medfl.server.federation import Federation
from medfl.server.gateway import Gateway, Peers
from medfl.server.runs import Run
from medfl.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medfl.common.tensors import Tensors
    from medfl.server.engine import Engine
    from medfl.server.rounds import Outcome, RoundRecord

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_DRAIN_S = 15.0


def serve(
    federation: Federation,
    settings: ServerSettings,
    ready: Callable[[int], None] = lambda port: None,
    stopping: threading.Event | None = None,
) -> None:
    """Answer hospitals and work off runs until SIGTERM or SIGINT, or `stopping` is set.

    ready: called with the gateway's port once calls are answered.

    Raises:
        StorageError: another server runs on this folder.
        ConfigError: the port is taken, or a certificate has expired.
    """
    from medfl.server.engine import Engine

    stopping = stopping or threading.Event()
    with only_one(federation.state / "server.lock", "medfl-server"), _signals(stopping):
        engine = Engine(private_folder(federation.folder / "engine"))
        peers = Peers(federation)
        gateway: Gateway | None = None
        engine.start()
        try:
            gateway = Gateway(
                federation, settings, peers, [engine.handlers(peers.site_of, peers.sessions)]
            )
            gateway.start()
            write_private(federation.state / "server.pid", f"{os.getpid()}\n".encode())
            federation.record("server started", port=gateway.port)
            _drop_interrupted(federation)
            ready(gateway.port)
            _work(federation, engine, stopping)
        finally:
            if gateway is not None:
                gateway.stop()
                federation.record("server stopped")
            engine.stop()
            (federation.state / "server.pid").unlink(missing_ok=True)


def running_pid(federation: Federation) -> int | None:
    """Process id of this folder's server; None where none runs."""
    try:
        with only_one(federation.state / "server.lock", "medfl-server"):
            return None
    except MedflError:
        pass
    try:
        return int((federation.state / "server.pid").read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT ask for the end; only the main thread can listen to them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        s: signal.signal(s, lambda *_: stopping.set()) for s in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drop_interrupted(federation: Federation) -> None:
    """Runs that a dead server left: their hospitals have spent privacy on rounds that are lost."""
    for run in runs.everything(federation):
        if run.state == "running":
            runs.end(federation, run, "failed", "the server stopped during the run", 1)


def _work(federation: Federation, engine: Engine, stopping: threading.Event) -> None:
    while not stopping.wait(_LOOK_S):
        queue = [r for r in runs.everything(federation) if r.state == "waiting"]
        for run in queue[:1]:
            # A daemon: a round that waits for a hospital must not hold up the server's end.
            arguments = (federation, engine, run, stopping)
            work = threading.Thread(target=_one, args=arguments, name="run", daemon=True)
            work.start()
            while work.is_alive() and not stopping.is_set():
                work.join(_LOOK_S)
            work.join(_DRAIN_S)
            left = runs.load(federation, run.id)
            if left.state not in runs.OVER:
                why = "the server stopped during the run" if stopping.is_set() else "see the log"
                runs.end(federation, left, "failed", why, 1)


def _one(federation: Federation, engine: Engine, run: Run, stopping: threading.Event) -> None:
    """A run from the queue to its end; no error of it ends the server."""
    try:
        study = study_text.from_text(studies.find(federation, run.digest).study)
        sites = _quorum(federation, engine, run, study, stopping)
        run = replace(run, state="running", sites=tuple(sites), missing=())
        runs.save(federation, run)
        federation.record("run started", run=run.id, study=run.digest, sites=sites)
        outcome = engine.run(
            study,
            seed=run.seed,
            run=run.id,
            deadline_s=run.deadline_s,
            only=sites,
            on_round=_note_rounds(federation, run, study.federation.rounds, stopping),
            **_checks(federation, run),
        )
        _finish(federation, run, study, outcome)
    except Interrupted as error:
        runs.end(federation, runs.load(federation, run.id), "stopped", str(error), error.exit_code)
    except MedflError as error:
        log.warning("run=%s failed: %s", run.id, error)
        runs.end(federation, runs.load(federation, run.id), "failed", str(error), error.exit_code)


def _quorum(
    federation: Federation, engine: Engine, run: Run, study: Study, stopping: threading.Event
) -> list[str]:
    """Sites that have approved and are connected, once they are enough.

    Raises:
        FederationError: they were not in time; the message names who is missing and why.
        Interrupted: somebody stopped the run or the server.
    """
    need, end = max(1, study.federation.min_sites), time.monotonic() + run.wait_s
    while True:
        approved = set(studies.approvals(federation, run.digest))
        there = approved & set(engine.roster.sites())
        missing = tuple(_missing(federation, run.digest, there))
        if len(there) >= need and (not approved - there or time.monotonic() > end - run.wait_s + 5):
            # Those who have approved get a moment to connect; then the others go on without them.
            return sorted(there)
        if missing != run.missing:
            run = replace(run, missing=missing)
            runs.save(federation, run)
        if time.monotonic() >= end:
            raise FederationError(
                f"{len(there)} of the {need} sites that the study needs have approved it and are "
                f"connected. Missing: {'; '.join(missing) or 'nobody was invited'}."
            )
        _refuse_stop(federation, run, stopping)
        time.sleep(_LOOK_S)


def _missing(federation: Federation, digest: str, there: set[str]) -> Iterator[str]:
    for record in federation.sites():
        if record.name not in there and record.status == "active":
            decision = studies.decision_of(federation, digest, record.name)
            why = studies.refusal(federation, record, decision, digest) or "not connected"
            yield f"{record.name} ({why})"


def _refuse_stop(federation: Federation, run: Run, stopping: threading.Event) -> None:
    if stopping.is_set():
        raise Interrupted("the server was stopped")
    if runs.is_to_stop(federation, run.id):
        raise Interrupted("stopped by a person")


def _note_rounds(
    federation: Federation, run: Run, rounds: int, stopping: threading.Event
) -> Callable[[RoundRecord, Tensors], None]:
    """What is kept of each round, and the place where a run can be stopped."""

    def note(record: RoundRecord, weights: Tensors) -> None:
        plain: dict[str, Any] = asdict(record)
        runs.add_round(federation, run.id, plain)
        if record.round > rounds:
            return  # the last model's validation: the training is over
        federation.record(
            "round void" if record.void else "round",
            run=run.id,
            round=record.round,
            sites=[s["name"] for s in record.sites],
            left_out=[f"{site}: {why}" for site, why in sorted(record.left_out.items())],
            model=tensors.digest(weights),
        )
        runs.save(federation, replace(runs.load(federation, run.id), round=record.round))
        _refuse_stop(federation, run, stopping)

    return note


def _checks(federation: Federation, run: Run) -> dict[str, Any]:
    """How each reply's seal is checked: against pinned keys, approvals and what came before."""
    from medfl.server.admit import Door

    seen = Seen(runs.folder_of(federation, run.id) / "seen.jsonl")
    return {"door": Door(federation, run.digest, run.id, seen)}


def _finish(federation: Federation, run: Run, study: Study, outcome: Outcome) -> None:
    path = runs.folder_of(federation, run.id) / "model.safetensors"
    about = {
        "study": study.name,
        "study_digest": study.digest,
        "run": run.id,
        "coordinator": public_of(federation.signing_key()),
    }
    tensors.save(outcome.weights, path, about)
    path.chmod(0o600)
    digest = runs.sha256(path)
    federation.record("model", run=run.id, sha256=digest, round=outcome.selected_round)
    done = replace(runs.load(federation, run.id), model=digest)
    runs.save(federation, done)
    runs.end(federation, done, "done", "", 0)
