"""`medfl-client line`: the network side of a divided hospital, and how a hospital is divided.

It holds the TLS key and nothing else of the hospital's: no image, no signing key, no approval, no
log but its own. What it can do with a coordinator that lies to it is hand the data side a task,
and that one asks the hospital's approvals at every task.
"""

from __future__ import annotations

import logging
import os
import pwd
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from medfl.client import enrolment
from medfl.client.coordinator import Line
from medfl.client.hatch import PREFIX, Hatch, is_hatch
from medfl.client.premises import Enrolment, Home
from medfl.common.config import decoded
from medfl.common.errors import ConfigError, FederationError, StorageError
from medfl.common.kept import save_record
from medfl.common.notify import tell
from medfl.common.private_files import only_one, private_folder, read_private, write_private
from medfl.common.stopping import set_by_signals

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_RENEW_S = 6 * 3600.0
_AGAIN_S = 15.0


def serve(
    home: Home,
    socket: Path,
    peers: frozenset[int],
    said: Callable[[str], None] = lambda text: None,
    stopping: threading.Event | None = None,
) -> None:
    """Carry calls and tasks between the data side and the coordinator until SIGTERM or SIGINT.

    home: the network side's own folder. peers: user ids of the data side.

    Raises:
        ConfigError: the folder holds a signing key, or is not a network side's.
        PolicyRefused: the certificate has expired.
    """
    if home.signing_file.exists():
        raise ConfigError(
            f"{home.folder}: holds the hospital's signing key, so that it is no network side's "
            "folder. Make one with: medfl-client divide"
        )
    stopping = stopping or threading.Event()
    site = home.enrolment().site
    hatch = Hatch(socket, peers)
    with only_one(home.folder / "line.lock", "medfl-client line"), set_by_signals(stopping):
        hatch.start()
        said(f"Line of {site}: waiting for the data side at {socket}.")
        tell("READY=1", "STATUS=waiting for the data side")
        for text in enrolment.ending(home):
            said(text)
        try:
            while not stopping.is_set():
                try:
                    with enrolment.line_to(home) as line:
                        _carry(home, hatch, line, site, said, stopping)
                except FederationError as error:
                    said(f"{error} Trying again in {_AGAIN_S:.0f} s.")
                    stopping.wait(_AGAIN_S)
        finally:
            tell("STOPPING=1")
            hatch.stop()


def _carry(
    home: Home,
    hatch: Hatch,
    line: Line,
    site: str,
    said: Callable[[str], None],
    stopping: threading.Event,
) -> None:
    """From one certificate to the next, or the end. Work goes on while the data side is there."""
    hatch.line, renewed = line, time.monotonic()
    try:
        with ExitStack() as work:
            busy, session = False, ""
            while not stopping.wait(_LOOK_S):
                there = hatch.trainer.attached
                if there != busy or (there and hatch.trainer.session != session):
                    busy, session = there, hatch.trainer.session
                    said("The data side is there." if busy else "The data side is gone.")
                    tell(f"STATUS={'working' if busy else 'waiting for the data side'}")
                    work.close()
                    if busy:
                        work.enter_context(_working(home, hatch, line, site))
                if time.monotonic() - renewed > _RENEW_S:
                    renewed = time.monotonic()
                    if enrolment.renew_if_due(home, line.address):
                        return
    finally:
        hatch.line = None


@contextmanager
def _working(home: Home, hatch: Hatch, line: Line, site: str) -> Iterator[None]:
    """SuperNode, forwarder and runner, as `medfl.client.service` has them in one process."""
    from medfl.client.runner import at_work

    trainer = hatch.trainer
    with at_work(line.channel, trainer.session, home.folder / "node", site, trainer):
        yield


def user_id(name: str) -> int:
    """Of a user's name or number. Raises ConfigError."""
    try:
        return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(f"{name}: there is no such user on this machine") from None


def divide(home: Home, network: Path, network_user: str, socket: Path) -> Enrolment:
    """Hand the TLS key of an enrolled hospital over to another user; done by root, once.

    The rest stays with the folder's owner, whose commands speak through `socket` from then on.
    Interrupted anywhere, the same command again goes on.

    Raises:
        ConfigError: not root, one user for both sides, or a folder that is another hospital's.
    """
    if os.geteuid() != 0:
        raise ConfigError("divide: changes the owner of files; run it as root")
    if not home.folder.exists():
        raise ConfigError(f"{home.folder}: there is no such folder; enrol first")
    # A decoder loads modules at its first use, and root's Python may be closed to other users.
    with suppress(ValidationError):
        decoded(b"{}", Enrolment)
    owner, other = home.folder.stat().st_uid, user_id(network_user)
    if owner == other:
        raise ConfigError(f"--network-user: {network_user} owns {home.folder}; name another user")
    with _as_user(owner), only_one(home.folder / "client.lock", "medfl-client"):
        known = home.enrolment()
        if is_hatch(known.address):
            home.identity_file.unlink(missing_ok=True)
            return known
        identity, authority = read_private(home.identity_file), read_private(home.authority_file)
    _hand_over(network, other, known, identity, authority)
    with _as_user(owner):
        home.record("divided", network_user=network_user)
        made = replace(known, address=f"{PREFIX}{socket}")
        save_record(home.enrolment_file, made)
        home.identity_file.unlink()
    return made


def _hand_over(folder: Path, owner: int, known: Enrolment, identity: bytes, pinned: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chown(folder, owner, pwd.getpwuid(owner).pw_gid)
    except (OSError, KeyError) as error:
        raise StorageError(f"{folder}: cannot be made for user {owner} ({error})") from None
    there = Home(folder)
    with _as_user(owner):
        private_folder(folder)
        if there.enrolment_file.exists() and there.enrolment().site != known.site:
            raise ConfigError(f"{folder}: is the network side of {there.enrolment().site} already")
        write_private(there.authority_file, pinned)
        write_private(there.identity_file, identity)
        # Pins of other sites are the data side's.
        save_record(there.enrolment_file, replace(known, sites={}))


@contextmanager
def _as_user(user: int) -> Iterator[None]:
    """What is made meanwhile belongs to the user, and what that one may not read is not read."""
    try:
        group = pwd.getpwuid(user).pw_gid
    except KeyError:
        group = user
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
