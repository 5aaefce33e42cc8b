"""A large model over a slow line that breaks: only what was under way is sent again."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest

from medfl.common import tensors

MB = 1_000_000


class SlowLine:
    """A TCP proxy: so many bytes a second each way, cut after so many one way.

    carried: bytes by direction, "up" from the hospital.
    """

    def __init__(self, target: str, bytes_s: float, cut_after: dict[str, list[int]]) -> None:
        host, port = target.rsplit(":", 1)
        self._target, self._bytes_s, self._cuts = (host, int(port)), bytes_s, cut_after
        self.carried = {"up": 0, "down": 0}
        self.cut = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                for way, source, sink in (("up", near, far), ("down", far, near)):
                    arguments = (way, source, sink)
                    threading.Thread(target=self._carry, args=arguments, daemon=True).start()

    def _carry(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                time.sleep(len(piece) / self._bytes_s)
                with self._lock:
                    self.carried[way] += len(piece)
                    if self._cuts[way] and self.carried[way] > self._cuts[way][0]:
                        del self._cuts[way][0]
                        self.cut += 1
                        break
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_after_a_cut_only_the_objects_under_way_are_sent_again(small) -> None:
    """40 MB at 100 Mbit/s, cut twice on the way down and twice on the way up."""
    world = small(names=("north",), rounds=1, hidden="3160, 3160")
    north = world.sites["north"]
    north.stop()
    cuts = {"down": [12 * MB, 30 * MB], "up": [5 * MB, 14 * MB]}
    line = SlowLine(world.gateway, 12.5 * MB, cuts)
    north.gateway = line.address
    north.start()
    try:
        world.wait()
        records = []

        def on_round(record, weights) -> None:
            records.append((record, dict(line.carried)))

        outcome = world.engine.run(world.study, seed=7, deadline_s=400, on_round=on_round)
    finally:
        line.close()
    record, carried = records[0]
    assert record.left_out == {}
    assert line.cut == 4
    size = sum(a.nbytes for a in tensors.floats(outcome.weights).values())
    assert size > 40 * MB
    # Two objects of 5 MiB are under way at a time, one way or the other; a cut in one direction
    # may also cost what was on its way in the other.
    again = 2 * 3 * 5.3 * MB
    assert size < carried["down"] < size + again
    assert 0.99 * record.bytes_up < carried["up"] < record.bytes_up + again
    # Sent anew from its beginning after each cut, the model would have come near three times.
    assert carried["down"] < 2 * size
