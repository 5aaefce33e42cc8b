"""The coordinator's engine: Flower's SuperLink as a child, and medfl's rounds over it.

run_study -> ConnectedSites -> Flower's grid -> SuperLink <- tunnel <- hospitals
No code from a bundle is executed here either: the rounds are the installed medfl's.
"""

from __future__ import annotations

import http.client
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from medfl.common.allocator import give_back
from medfl.common.bundle import study_bundle
from medfl.common.child import Child, Launch
from medfl.common.errors import FederationError, StorageError
from medfl.common.shelf import Shelf
from medfl.common.study import Study
from medfl.common.tensors import Tensors
from medfl.common.tunnel import KEY_HEADER
from medfl.server.rounds import Earlier, Outcome, RoundRecord, run_study

if TYPE_CHECKING:
    from medfl.server.admit import Door
    from medfl.server.bounds import Doorman
    from medfl.server.checkpoint import Checkpoint
    from medfl.server.register import Roster
    from medfl.server.sessions import Sessions
    from medfl.server.tunnel import Gate

log = logging.getLogger(__name__)

_START_S = 60.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class Engine:
    """A SuperLink in `folder`, alive from `start` to `stop`.

    folder: its database, log and key; 0700. The port is bound here and inherited, so that it is
    the same for every SuperLink that the supervisor starts.
    """

    def __init__(self, folder: Path) -> None:
        from medfl.server.register import Roster

        self.folder = folder
        self.roster: Roster = Roster()
        self.address = ""
        self._listener: socket.socket | None = None
        self._key = ""
        self._gate: Gate | None = None
        self._shelf = Shelf(folder / "objects")
        self.child = Child("SuperLink", self._launch, folder / "superlink.log")

    def start(self) -> str:
        """Start it and wait until it answers; returns its loopback address.

        Raises:
            FederationError: it does not come up; superlink.log says why.
        """
        os.environ.update(QUIET)
        give_back()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._shelf.sweep()
        self._key = _kept_secret(self.folder / "engine.key")
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        host, port = self._listener.getsockname()[:2]
        self.address = f"{host}:{port}"
        self.child.start()
        end = time.monotonic() + _START_S
        while not self.healthy():
            if time.monotonic() > end:
                self.stop()
                raise FederationError(
                    f"The engine did not start within {_START_S:.0f} s. "
                    f"Read {self.folder / 'superlink.log'}"
                )
            time.sleep(0.1)
        return self.address

    def stop(self) -> None:
        """End it cleanly."""
        self.child.stop()
        if self._gate is not None:
            self._gate.close()
        if self._listener is not None:
            self._listener.close()

    def healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether the SuperLink answers within the time."""
        host, port = self.address.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
        try:
            connection.request("GET", "/health", headers={KEY_HEADER: self._key})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def handlers(
        self,
        site_of: Callable[[grpc.ServicerContext], str],
        sessions: Sessions | None = None,
        doorman: Doorman | None = None,
    ) -> grpc.GenericRpcHandler:
        """The tunnel for hospitals, to be added to the gateway's gRPC server.

        sessions, doorman: the gateway's, so that both know one live client a site, and one thread
        ends calls of which nothing comes.
        """
        from medfl.server.tunnel import Gate, fleet_handlers

        if self._gate is None:
            self._gate = Gate(self.address, self._key, self.roster, sessions, self._shelf)
        if doorman is None:
            return fleet_handlers(self._gate, site_of)
        return fleet_handlers(self._gate, site_of, doorman.within)

    def run(
        self,
        study: Study,
        *,
        seed: int,
        run: str = "main",
        deadline_s: float = 3600.0,
        only: Callable[[], Collection[str]] | None = None,
        attempt: int = 0,
        earlier: Earlier | None = None,
        on_round: Callable[[RoundRecord, Tensors], None] = lambda record, weights: None,
        keep: Callable[[Checkpoint], None] = lambda checkpoint: None,
        check: Callable[[], None] = lambda: None,
        enough: Callable[[], bool] = lambda: False,
        bundle: bytes | None = None,
        door: Door | None = None,
    ) -> Outcome:
        """Run one study with the hospitals that are connected, or those of them in `only()`.

        attempt, earlier, on_round, keep, enough: as `run_study` takes them. check: called while
        sites are waited for; what it raises ends the run. bundle: only for tests, which send what
        medfl never does. door: checks each answer's seal.

        Raises:
            MedflError: what `run_study` raises, or the engine refused the run.
        """
        from medfl.server.flower import ConnectedSites
        from medfl.server.link import Link

        work = Link(self.address, self._key, self._shelf).start_run(
            study_bundle(study.digest) if bundle is None else bundle
        )
        completed = False
        try:
            outcome = run_study(
                study,
                ConnectedSites(
                    work, self.roster, deadline_s=deadline_s, only=only, door=door, check=check
                ),
                seed=seed,
                run=run,
                attempt=attempt,
                earlier=earlier,
                on_round=on_round,
                keep=keep,
                enough=enough,
            )
            completed = True
            return outcome
        finally:
            work.end(completed=completed)

    def _launch(self) -> Launch:
        if self._listener is None:
            raise FederationError("The engine has no port; call start().")
        return Launch(
            command=[sys.executable, "-P", "-m", "medfl.server.superlink"],
            env={
                **QUIET,
                "FLWR_HOME": str(self.folder / "flwr"),
                "MEDFL_LISTENER": str(self._listener.fileno()),
                "MEDFL_DATABASE": str(self.folder / "superlink.db"),
            },
            first_line=self._key,
            descriptors=(self._listener.fileno(),),
        )


def _kept_secret(path: Path) -> str:
    """The engine's key, drawn at the first start: hospitals' node keys derive from it.

    Raises:
        StorageError: the file cannot be written, or others may read it.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    except OSError as error:
        raise StorageError(f"{path}: could not be written ({error.strerror})") from None
    if path.stat().st_mode & 0o077:
        raise StorageError(f"{path}: others may read it. Run chmod 600 on it, or remove it")
    key = path.read_text().strip()
    if len(key) != 64:
        raise StorageError(f"{path}: is damaged. Remove it while the coordinator is stopped")
    return key
