"""`medfl-server start`: gateway, engine, and the runs one after another, until told to stop."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from medfl.common.errors import MedflError, StorageError
from medfl.common.private_files import only_one, private_folder, write_private
from medfl.common.stopping import set_by_signals
from medfl.server import backup, runs
from medfl.server.bounds import Doorman, raise_descriptors
from medfl.server.federation import Federation
from medfl.server.gateway import Gateway, Peers
from medfl.server.runs import Run
from medfl.server.settings import ServerSettings
from medfl.server.work import work_off

if TYPE_CHECKING:
    from medfl.server.engine import Engine

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_DRAIN_S = 15.0
_AGAIN_S = 5.0


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
    with only_one(federation.state / "server.lock", "medfl-server"), set_by_signals(stopping):
        raise_descriptors()  # before the engine's child, which has the same limit
        engine = Engine(private_folder(federation.folder / "engine"))
        peers, doorman = Peers(federation), Doorman()
        gateway: Gateway | None = None
        engine.start()
        try:
            tunnel = engine.handlers(peers.site_of, peers.sessions, doorman)
            gateway = Gateway(federation, settings, peers, [tunnel], doorman)
            gateway.start()
            write_private(federation.state / "server.pid", f"{os.getpid()}\n".encode())
            federation.record("server started", port=gateway.port)
            for line in backup.unconfirmed(federation):
                log.warning(line)
            ready(gateway.port)
            _work(federation, engine, stopping, settings.connect_wait_s)
        finally:
            if gateway is not None:
                gateway.stop()
                with suppress(StorageError):  # a full disk is no reason to leave children behind
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


def _work(
    federation: Federation, engine: Engine, stopping: threading.Event, connect_s: float
) -> None:
    for run in runs.take_up(federation):
        federation.record("run taken up", run=run.id, attempt=run.attempt)
        log.warning("run=%s was interrupted; it goes on", run.id)
    while not stopping.wait(_LOOK_S):
        try:
            queue = [r for r in runs.everything(federation) if r.state == "waiting"]
            if backup.unconfirmed(federation):
                continue  # a hospital may have been revoked since, and nobody would know
            for run in queue[:1]:
                _supervised(federation, engine, run, stopping, connect_s)
        except Exception:
            # A moment without descriptors, threads or disk: hospitals are answered meanwhile.
            log.exception("the queue of runs could not be worked off; trying again")
            stopping.wait(_AGAIN_S)


def _supervised(
    federation: Federation,
    engine: Engine,
    run: Run,
    stopping: threading.Event,
    connect_s: float,
) -> None:
    """One run in a thread that cannot hold up the server's end; no error of it ends the server."""
    work = threading.Thread(
        target=work_off,
        args=(federation, engine, run, stopping, connect_s),
        name="run",
        daemon=True,
    )
    work.start()
    while work.is_alive() and not stopping.is_set():
        work.join(_LOOK_S)
    work.join(_DRAIN_S)
    if stopping.is_set():
        return  # what is not over now is taken up by the next start
    try:
        left = runs.load(federation, run.id)
        if left.state not in runs.OVER:
            runs.end(federation, left, "failed", "see the server's log", 1)
    except StorageError as error:
        log.error("run=%s: how it ended could not be written: %s", run.id, error)
