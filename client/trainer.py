"""The process that trains: `python -m medfl.client.trainer MODULE:FUNCTION ARGUMENT`.

It alone sees data and holds torch, the GPU and the cohort, and keeps them between rounds. It may
die (out of memory, a crash in a driver) without harm: the runner reports that and starts another.

FUNCTION(ARGUMENT) returns the `FindHospital` of this site.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from medfl.common.child import end_with_parent, received

if TYPE_CHECKING:
    from medfl.client.flower import FindHospital

log = logging.getLogger(__name__)


def frame(payload: Iterable[bytes | memoryview], run_id: int, node_id: int, study: str) -> bytes:
    """One task as the runner sends it. payload: in pieces."""
    head = json.dumps({"run_id": run_id, "node_id": node_id, "study": study}).encode()
    return b"".join([len(head).to_bytes(4, "big"), head, *payload])


def work(find_hospital: FindHospital) -> Callable[[bytes | bytearray], bytes]:
    """A framed task to the bytes of its reply."""
    from medfl.client.flower import client_app
    from medfl.client.tasks import run_payload

    app = client_app(find_hospital)

    def do(task: bytes | bytearray) -> bytes:
        size = int.from_bytes(task[:4], "big")
        about = json.loads(task[4 : 4 + size])
        return run_payload(app, memoryview(task)[4 + size :], **about)

    return do


def preload() -> None:
    """Import what every round needs, and train on one thread: sums then depend on no machine."""
    import torch

    import medfl.client.training.loop
    import medfl.client.training.predict
    import medfl.common.models  # noqa: F401

    torch.set_num_threads(1)


def gpu_failed() -> bool:
    """Whether this process has a GPU that is of no more use to it; CUDA never recovers."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> int:
    """The child; the pipe's descriptor is in MEDFL_PIPE."""
    end_with_parent()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    where, argument = sys.argv[1:3]
    module, function = where.split(":")
    do = work(getattr(importlib.import_module(module), function)(argument))
    preload()
    pipe = Connection(int(os.environ["MEDFL_PIPE"]))
    pipe.send_bytes(b"ready")
    while True:
        try:
            task = received(pipe)
        except EOFError:
            return 0
        pipe.send_bytes(do(task))
        if gpu_failed():
            log.error("the GPU does not answer any more; this process ends, another is started")
            return 1


if __name__ == "__main__":
    raise SystemExit(main())
