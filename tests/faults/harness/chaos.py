"""A TCP proxy on loopback that misbehaves on demand: it stands between one hospital and the port.

Faults hold for the open connections and for new ones, until `mend`.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace

_PIECE = 16 * 1024


@dataclass(frozen=True)
class Faults:
    """refuse: new connections are reset. hole: bytes are taken and go nowhere.

    delay_s: before each piece. up_bytes_s: the most that passes upwards (to the coordinator).
    cut_after: a connection ends once so many bytes have passed upwards.
    """

    refuse: bool = False
    hole: bool = False
    delay_s: float = 0.0
    up_bytes_s: float | None = None
    cut_after: int | None = None


class Chaos:
    """Listens on a free port, or on `port`, and leads to `target` (host:port, changeable)."""

    def __init__(self, target: str, port: int = 0) -> None:
        self.target = target
        self.faults = Faults()
        self.passed_up = self.passed_down = self.connections = 0
        self._open: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        self.faults = replace(self.faults, refuse=True)
        self.reset()

    def black_hole(self) -> None:
        """Hold every connection open and let nothing through."""
        self.faults = replace(self.faults, hole=True)

    def slow(self, *, delay_s: float = 0.0, up_bytes_s: float | None = None) -> None:
        """Wait before each piece; let only so much pass upwards."""
        self.faults = replace(self.faults, delay_s=delay_s, up_bytes_s=up_bytes_s)

    def truncate(self, after: int) -> None:
        """End each connection once so many bytes have passed upwards on it."""
        self.faults = replace(self.faults, cut_after=after)

    def mend(self) -> None:
        """Behave from now on. What lay in a hole is lost, and so are its connections."""
        lost = self.faults.hole
        self.faults = Faults()
        if lost:
            self.reset()

    def reset(self) -> None:
        """End every connection, without the goodbye of TCP."""
        with self._lock:
            pairs, self._open = self._open, []
        for pair in pairs:
            for end in pair:
                _reset(end)

    def half_close(self) -> None:
        """Tell the coordinator that the hospital has no more to say, and leave the rest open."""
        with self._lock:
            pairs = list(self._open)
        for _, out in pairs:
            with suppress(OSError):
                out.shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        """End."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.faults.refuse:
                _reset(end)
                continue
            host, port = self.target.rsplit(":", 1)
            try:
                out = socket.create_connection((host, int(port)), timeout=5)
            except OSError:
                _reset(end)
                continue
            out.settimeout(None)
            with self._lock:
                self._open.append((end, out))
            for source, sink, up in ((end, out, True), (out, end, False)):
                threading.Thread(target=self._pump, args=(source, sink, up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        passed = 0
        try:
            while piece := source.recv(_PIECE if not up else self._piece()):
                while self.faults.hole:
                    time.sleep(0.05)
                    if source.fileno() < 0:
                        return
                faults = self.faults
                time.sleep(faults.delay_s)
                if up and faults.up_bytes_s:
                    time.sleep(len(piece) / faults.up_bytes_s)
                sink.sendall(piece)
                passed += len(piece)
                if up:
                    self.passed_up += len(piece)
                    if faults.cut_after is not None and passed >= faults.cut_after:
                        break
                else:
                    self.passed_down += len(piece)
        except OSError:
            pass
        for end in (source, sink):
            _reset(end)

    def _piece(self) -> int:
        rate = self.faults.up_bytes_s
        return _PIECE if rate is None else max(1, min(_PIECE, int(rate / 10)))


def _reset(end: socket.socket) -> None:
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        end.close()
