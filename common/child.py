"""A child process that is kept alive: started, watched, replaced when it dies, ended cleanly.

It ends with its parent: its standard input is a pipe that nobody else holds, and `end_with_parent`
in the child ends the process when that pipe closes, however the parent died.
"""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
# A child that has lived this long starts the back-off anew when it dies.
_WELL_S = 60.0
_LOG_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a child. first_line: a secret that goes through its standard input."""

    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    first_line: str = ""
    descriptors: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Launch({list(self.command)})"


class Child:
    """One supervised process. `launch` is asked anew for every start.

    log_file: what the child writes; it stays on this machine and is cut at 10 MB.
    """

    def __init__(self, name: str, launch: Callable[[], Launch], log_file: Path) -> None:
        self.name = name
        self.starts = 0
        self._launch, self._log_file = launch, log_file
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name=f"keep-{name}", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id; None between a death and the next start."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def start(self) -> None:
        """Start it, and again whenever it ends, until `stop`."""
        self._thread.start()

    def replace(self) -> None:
        """End the present process, which lets the supervisor start another."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self, patience_s: float = 10.0) -> None:
        """End it: SIGTERM, and SIGKILL after `patience_s`."""
        self._stopping.set()
        if self._thread.is_alive():
            process = self._process
            if process is not None:
                _end(process, patience_s)
            self._thread.join(timeout=patience_s)

    def _keep(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._stopping.is_set():
            started = time.monotonic()
            process = self._start()
            if self._stopping.is_set():
                _end(process, 1.0)
            code = process.wait()
            if process.stdin is not None:
                process.stdin.close()
            if self._stopping.is_set():
                return
            if time.monotonic() - started > _WELL_S:
                wait_s = _FIRST_WAIT_S
            log.warning("%s ended with code %d; again in %.1f s", self.name, code, wait_s)
            self._stopping.wait(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    def _start(self) -> subprocess.Popen[bytes]:
        launch = self._launch()
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        size = self._log_file.stat().st_size if self._log_file.exists() else 0
        with self._log_file.open("ab" if size < _LOG_BYTES else "wb") as output:
            process = subprocess.Popen(
                launch.command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **launch.env},
                pass_fds=launch.descriptors,
                # Ctrl-C reaches the whole terminal group; the parent decides when children end.
                start_new_session=True,
            )
        self._process = process
        self.starts += 1
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.write(launch.first_line.encode() + b"\n")
                process.stdin.flush()
        return process


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()


def received(pipe: Connection) -> bytearray:
    """What the other end's `send_bytes` sent, in memory that is set aside once and may change.

    `recv_bytes` copies it twice. Raises EOFError where the other end is gone.
    """
    (size,) = struct.unpack("!i", _exactly(pipe, 4))
    if size == -1:  # longer than 2^31 - 1: the length follows
        (size,) = struct.unpack("!Q", _exactly(pipe, 8))
    return _exactly(pipe, size)


def _exactly(pipe: Connection, size: int) -> bytearray:
    whole = bytearray(size)
    left = memoryview(whole)
    while left:
        n = os.readv(pipe.fileno(), [left])
        if n == 0:
            raise EOFError
        left = left[n:]
    return whole


def first_line() -> str:
    """In the child: the line that came with the launch. Unbuffered, so that no more is taken."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


def end_with_parent() -> None:
    """In the child, after `first_line`: end this process when the parent is gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
