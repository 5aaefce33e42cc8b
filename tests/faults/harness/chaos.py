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


class _Line:
    """One connection's two ends. Closed once both directions have ended, and by one thread: another
    would close whatever has got the number meanwhile."""

    def __init__(self, end: socket.socket, out: socket.socket) -> None:
        self.ends = end, out
        self.over = False
        self.passed_up = 0
        self._directions = 2
        self._lock = threading.Lock()

    def break_off(self) -> None:
        """End both directions, without the goodbye of TCP."""
        with self._lock:
            self._break_off()

    def leave(self) -> None:
        """One direction has ended."""
        with self._lock:
            self._break_off()
            self._directions -= 1
            if not self._directions:
                for end in self.ends:
                    end.close()

    def half_close(self) -> None:
        """Say goodbye to the target, and hear it on."""
        with self._lock, suppress(OSError):
            if not self.over:
                self.ends[1].shutdown(socket.SHUT_WR)

    def _break_off(self) -> None:
        if not self.over:
            self.over = True
            for end in self.ends:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)


class Chaos:
    """Listens on a free port and leads to `target` (host:port, changeable)."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.faults = Faults()
        self.passed_up = self.passed_down = self.connections = 0
        self._lines: list[_Line] = []
        self._stopped = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

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
        """End every connection."""
        lines, self._lines = self._lines, []
        for line in lines:
            line.break_off()

    def half_close(self) -> None:
        """Tell the coordinator that the hospital has no more to say, and leave the rest open."""
        for line in list(self._lines):
            line.half_close()

    def stop(self) -> None:
        """End."""
        self._stopped = True
        self.reset()
        # Wakes the thread that waits there; the listener is its own to close.
        with suppress(OSError):
            host, port = self.address.split(":")
            socket.create_connection((host, int(port)), timeout=1).close()
        self._thread.join(5)

    def _accept(self) -> None:
        with self._listener:
            while not self._stopped:
                end, _ = self._listener.accept()
                self.connections += 1
                self._lead(end)

    def _lead(self, end: socket.socket) -> None:
        host, port = self.target.rsplit(":", 1)
        try:
            if self.faults.refuse or self._stopped:
                raise ConnectionRefusedError
            out = socket.create_connection((host, int(port)), timeout=5)
        except OSError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()
            return
        out.settimeout(None)
        line = _Line(end, out)
        self._lines.append(line)
        for up in (True, False):
            threading.Thread(target=self._pump, args=(line, up), daemon=True).start()

    def _pump(self, line: _Line, up: bool) -> None:
        source, sink = line.ends if up else line.ends[::-1]
        try:
            while (piece := source.recv(self._piece(up))) and self._passed(line, piece, up):
                sink.sendall(piece)
        except OSError:
            pass
        line.leave()

    def _passed(self, line: _Line, piece: bytes, up: bool) -> bool:
        """Wait as the faults say; False where the connection is to end before this piece."""
        while self.faults.hole and not line.over:
            time.sleep(0.05)
        faults = self.faults
        time.sleep(faults.delay_s)
        if not up:
            self.passed_down += len(piece)
            return not line.over
        if faults.up_bytes_s:
            time.sleep(len(piece) / faults.up_bytes_s)
        self.passed_up += len(piece)
        line.passed_up += len(piece)
        return not line.over and (faults.cut_after is None or line.passed_up <= faults.cut_after)

    def _piece(self, up: bool) -> int:
        rate = self.faults.up_bytes_s if up else None
        return _PIECE if rate is None else max(1, min(_PIECE, int(rate / 10)))
