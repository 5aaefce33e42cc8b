"""`medfl-client start`: the tunnel, the SuperNode and the runner, until told to stop.

One outbound connection carries everything. A certificate that was renewed is taken up by ending
this connection and beginning the next; the training process stays warm meanwhile.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from medfl import __version__
from medfl.client import consent, enrolment, hatch, refusals, witness
from medfl.client.coordinator import Line
from medfl.client.ledger import Ledger
from medfl.client.premises import Home
from medfl.client.site_file import SiteFile
from medfl.common.coordination import Bye, Done, Heard, Report
from medfl.common.denials import Denials
from medfl.common.errors import (
    FederationError,
    LogRolledBack,
    MedflError,
    PolicyRefused,
    StorageError,
)
from medfl.common.kept import save_record
from medfl.common.notify import tell
from medfl.common.private_files import is_full, only_one
from medfl.common.stopping import set_by_signals

log = logging.getLogger(__name__)

_REPORT_S = 5.0
# Sites that enrolled meanwhile: their keys are needed in a secure sum.
_GREET_S = 60.0
_RENEW_S = 6 * 3600.0
_FULL_DISK_S = 5.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
FINDER = "medfl.client.approved:hospitals"


@dataclass(frozen=True, slots=True)
class Status:
    """What the running client last said, for `medfl-client status`.

    at: seconds since 1970. site_file: path of the site.toml that it goes by.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    at: float
    state: str
    detail: str = ""
    site_file: str = ""


def serve(
    home: Home,
    site_file: Path,
    said: Callable[[str], None] = lambda text: None,
    stopping: threading.Event | None = None,
) -> None:
    """Take part until SIGTERM or SIGINT, or `stopping` is set.

    said: told what a person may want to see: connected, waiting, lost.

    Raises:
        PolicyRefused: the coordinator refuses this site for good (revoked, expired), or its
            privacy ledger was put back.
        ConfigError: others may write a file of this site.
        StorageError: another client runs on this folder, or a file is damaged; a full disk is
            told and waited for.
    """
    stopping = stopping or threading.Event()
    session, wait_s = secrets.token_hex(16), _FIRST_WAIT_S
    with only_one(home.folder / "client.lock", "medfl-client"), set_by_signals(stopping):
        disk = Disk(home.folder, said, stopping)
        _started(home, disk)
        tell("READY=1")
        for text in enrolment.ending(home):
            said(text)
        while not stopping.is_set():
            started = time.monotonic()
            try:
                _connection(home, site_file, session, said, stopping)
                wait_s = _FIRST_WAIT_S
            except (FederationError, PolicyRefused) as error:
                # What is wrong with this site's own files (ConfigError, StorageError) ends it.
                if isinstance(error, PolicyRefused) and "try again in" not in str(error):
                    _note(home, site_file, "refused", str(error))
                    home.record("client stopped by a refusal", why=str(error)[:500])
                    raise
                said(f"{error} Trying again in {wait_s:.0f} s.")
                _note(home, site_file, "not connected", str(error))
                stopping.wait(wait_s)
                well = time.monotonic() - started > _LONGEST_WAIT_S
                wait_s = _FIRST_WAIT_S if well else min(2 * wait_s, _LONGEST_WAIT_S)
            except StorageError as error:
                disk.wait_for_room(error)
        with suppress(StorageError):  # a full disk is no reason not to stop
            home.record("client stopped")
        _note(home, site_file, "stopped")


def _started(home: Home, disk: Disk) -> None:
    """Write it down, as soon as the disk takes it; nothing is done before."""
    while not disk.stopping.is_set():
        try:
            home.record("client started")
            return
        except StorageError as error:
            disk.wait_for_room(error)


def _connection(
    home: Home,
    site_file: Path,
    session: str,
    said: Callable[[str], None],
    stopping: threading.Event,
) -> None:
    """From greeting to the end of one connection: a stop, or a renewed certificate."""
    with enrolment.line_to(home) as line:
        try:
            enrolment.greet(home, line, session, __version__)
            consent.fetch(home, line)
            consent.send_all(home, line)
            own = SiteFile(home, site_file)
            ledger = Ledger(own.read().ledger)
            witness.exchange(home, line, ledger)
            said(f"Connected to {line.address}. Waiting for approved studies.")
            with _working(home, site_file, line, session):
                _report(line, own, ledger, session, said, stopping)
        finally:
            # Also where the greeting fails (a skewed clock): else the next start would hear that
            # another client is running, and not what is wrong.
            try:
                line.call("Bye", Bye(session), Done)
            except MedflError as error:
                log.info("no goodbye: %s", error)


@contextmanager
def _working(home: Home, site_file: Path, line: Line, session: str) -> Iterator[None]:
    """The processes that do the work, ended in the order that loses least."""
    from medfl.client.runner import Trainer, at_work

    argument = json.dumps({"state": str(home.folder), "site": str(site_file)})
    trainer = Trainer.for_hospitals(FINDER, argument, home.folder / "trainer.log")
    if hatch.is_hatch(line.address):
        with hatch.attached(line.address, trainer, session):
            yield
        return
    site, folder = home.enrolment().site, home.folder / "node"
    note = partial(consent.note_refusal, home, Denials())
    with at_work(line.channel, session, folder, site, trainer, note):
        yield


def _report(
    line: Line,
    own: SiteFile,
    ledger: Ledger,
    session: str,
    said: Callable[[str], None],
    stopping: threading.Event,
) -> None:
    """Say every few seconds that this site is there; show the log's head when it has grown."""
    home, renewed = own.home, time.monotonic()
    greeted = renewed
    shown, lost = home.audit.head().n, False
    for text in own.news():
        said(text)
    _note(home, own.file, "connected")
    refused = refusals.News(home)
    refused.news()
    disk = Disk(home.folder, said, stopping)
    while not stopping.wait(_REPORT_S):
        try:
            for text in (*own.news(), *refused.news()):
                said(text)
            heard = line.call("Report", Report(session, "connected"), Heard)
            if lost:
                said("Connected again.")
                # Whoever is back may have been put back from a backup: look at its log now.
                lost, shown = False, -1
            if time.monotonic() - greeted > _GREET_S:
                greeted = time.monotonic()
                enrolment.greet(home, line, session, __version__)
            if home.audit.head().n != shown or witness.is_behind(home, heard.lines):
                witness.exchange(home, line, ledger)
                consent.fetch(home, line)
                shown = home.audit.head().n
            _note(home, own.file, "connected")
            if time.monotonic() - renewed > _RENEW_S:
                renewed = time.monotonic()
                if enrolment.renew_if_due(home, line.address):
                    return
                for text in enrolment.ending(home):
                    said(text)
        except PolicyRefused as error:
            if "is not live" not in str(error):
                raise
            # The coordinator has restarted and forgotten this session.
            enrolment.greet(home, line, session, __version__)
            shown = -1  # it may have been put back from a backup: look at its log next time
        except StorageError as error:
            disk.wait_for_room(error)
        except LogRolledBack:
            raise  # ends the connection, and with it the work
        except FederationError as error:
            # The tunnel holds the SuperNode's calls until the line is back.
            if not lost:
                said(f"{error} Training goes on when it is back.")
            lost = True
            _note(home, own.file, "not connected", str(error))


@dataclass(frozen=True, slots=True)
class Disk:
    """Of the state folder: told and waited for where it is full."""

    folder: Path
    said: Callable[[str], None]
    stopping: threading.Event
    pause_s: float = _FULL_DISK_S

    def wait_for_room(self, error: StorageError) -> None:
        """Return when there is room again, or at a stop. Raises the error where it is another."""
        if not is_full(self.folder) and "No space left" not in str(error):
            raise error
        self.said(
            f"The disk of {self.folder} is full: nothing is trained and nothing answered until "
            "there is room. Free some space; this client goes on by itself."
        )
        while not self.stopping.wait(self.pause_s) and is_full(self.folder):
            pass
        if not self.stopping.is_set():
            self.said("There is room on the disk again.")


def _note(home: Home, site_file: Path, state: str, detail: str = "") -> None:
    tell(f"STATUS={state}")
    told = Status(home.clock(), state, detail, str(site_file))
    try:
        save_record(home.folder / "status.json", told)
    except StorageError as error:  # what a person reads may be old; what is signed may not
        log.warning("%s", error)
