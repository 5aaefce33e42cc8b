"""Flower's SuperNode as a child process: `python -m medfl.client.supernode HOST:PORT PORT FOLDER`.

It talks to the tunnel's end on this machine, and hands tasks only to who knows the secret.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from medfl.common.child import end_with_parent, first_line
from medfl.common.shelf import Shelf

_SHORTEST_S, _NEW_SERIES_S = 0.03, 0.1


class ShortNaps:
    """Stands for the module `time` in the SuperNode's loop: sleeps at most a little at first.

    The longer a series of naps goes on, the longer each is: 30 ms, then 2 % of what has passed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = self._woke = clock()

    def sleep(self, wanted_s: float) -> None:
        """Sleep for `wanted_s` at most."""
        now = self._clock()
        if now - self._woke > _NEW_SERIES_S:
            self._since = now
        time.sleep(min(wanted_s, max(_SHORTEST_S, 0.02 * (now - self._since))))
        self._woke = self._clock()


class LastQuestion:
    """Keeps the SuperNode's loop from falling one answer behind.

    Flower pulls a message, waits for any answer, sends it and pulls again. A message whose run
    ended while it was fetched stays in the node's state and is answered all the same; that answer
    is then taken for the next message's, whose own waits for the one after it: late every round.
    """

    def __init__(self, loop: Any) -> None:
        self._pull, self._push = loop._pull_and_store_message, loop._push_messages
        self._question = ""

    def pull(self, *, receive: Callable[[], Any], **rest: Any) -> int | None:
        """Flower's pull, which says whose run the message is of; the message is noted."""

        def noted() -> Any:
            found = receive()
            if found is not None:
                self._question = found[0].metadata.message_id
            return found

        run: int | None = self._pull(receive=noted, **rest)
        return run

    def push(self, *, state: Any, **rest: Any) -> None:
        """Flower's push, until the message that was pulled last has been answered."""
        while True:
            self._push(state=state, **rest)  # takes a question away together with its answer
            if self._question not in state.msg_store:
                return


def main() -> int:
    """The child: tunnel, port and its shelf's folder; the secret is the first line of the input."""
    superlink, port, folder = sys.argv[1:4]
    secret = first_line()
    end_with_parent()
    from flwr.supercore.object_store import object_store_factory
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    from medfl.client.objects import ShelfObjectStore

    # Flower chooses the store by the database's name alone; a SuperNode has none.
    store = partial(ShelfObjectStore, Shelf(Path(folder)))
    vars(object_store_factory)["InMemoryObjectStore"] = store
    # Flower's loop looks for an answer twice a second, which is most of a short round.
    vars(start_client_internal)["time"] = ShortNaps()
    last = LastQuestion(start_client_internal)
    vars(start_client_internal)["_pull_and_store_message"] = last.pull
    vars(start_client_internal)["_push_messages"] = last.push
    # Flower reads the secret from a path; this one leaves nothing on the disk.
    reading, writing = os.pipe()
    os.write(writing, secret.encode())
    os.close(writing)
    sys.argv = [
        "flower-supernode",
        "--insecure",  # loopback to loopback; what leaves the machine goes through the tunnel
        *("--superlink", superlink),
        *("--isolation", "process"),
        *("--host", "127.0.0.1"),
        *("--port", port),
        *("--superexec-auth-secret-file", f"/dev/fd/{reading}"),
    ]
    flower_supernode()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
