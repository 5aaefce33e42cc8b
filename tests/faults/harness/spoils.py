"""What `spoiled.py` can break. Each takes one argument (JSON) and replaces something of medfl's.

Coordinator: clock, die_*, garbage, redirect. Hospital: clock, trainer. Its trainer: the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc._channel
import grpc._common
import grpc._server
import numpy as np

_SPOILED = Path(__file__).with_name("spoiled.py")


def clock(file: str) -> None:
    """The wall clock is off by the seconds in this file, which may change at any time.

    gRPC hands deadlines as wall time to its C core, which this does not reach: it keeps the true
    clock.
    """
    true = time.time
    for part in (grpc._channel, grpc._common, grpc._server):
        part.time = SimpleNamespace(**vars(time))

    def shifted() -> float:
        try:
            return true() + float(Path(file).read_text() or 0)
        except (OSError, ValueError):
            return true()

    time.time = shifted


def trainer(spoils: dict[str, Any]) -> None:
    """The hospital's training process is broken."""
    from medfl.client import runner

    def for_hospitals(cls: Any, where: str, argument: str, log_file: Path) -> Any:
        command = [sys.executable, str(_SPOILED), "trainer", json.dumps(spoils), where, argument]
        return cls(command, log_file)

    runner.Trainer.for_hospitals = classmethod(for_hospitals)


# The coordinator --------------------------------------------------------------------------------


def garbage(file: str) -> None:
    """While the file exists: hospitals' nodes hear 200 and no protobuf at all."""
    from medfl.common.tunnel import Answer
    from medfl.server.tunnel import Gate

    true = Gate.answer

    def spoilt(self: Any, site: str, call: Any, *more: Any) -> Answer:
        if Path(file).exists():
            return Answer(200, {"content-type": "application/protobuf"}, b"\xff\xfe nothing" * 3)
        return true(self, site, call, *more)

    Gate.answer = spoilt


def redirect(about: dict[str, str]) -> None:
    """While about["file"] exists: nodes are told to go elsewhere, to about["to"]."""
    from medfl.common.tunnel import Answer
    from medfl.server.tunnel import Gate

    true = Gate.answer

    def spoilt(self: Any, site: str, call: Any, *more: Any) -> Answer:
        if Path(about["file"]).exists():
            return Answer(307, {"location": about["to"] + call.path}, b"")
        return true(self, site, call, *more)

    Gate.answer = spoilt


def die(about: dict[str, Any]) -> None:
    """The coordinator is killed, once, in round about["round"] at about["at"], of `deaths.py`."""
    from harness.deaths import DEATHS

    def now() -> None:
        try:
            Path(about["once"]).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    DEATHS[about["at"]](about["round"], now)


# A hospital's trainer ---------------------------------------------------------------------------


def update(file: str) -> None:
    """Answers are what `lies.py` makes of them, by the plan in this file."""
    from harness.lies import update as lie

    lie(file)


def fate(file: str) -> None:
    """What this file holds happens once, at one of three moments; the file is gone when it does.

    {"at": "train" | "before ledger" | "after ledger", "do": a key of FATES, ...}
    """
    from medfl.client.ledger import Ledger
    from medfl.client.training import loop

    train, reserve = loop.train, Ledger.reserve

    def meet(moment: str) -> None:
        try:
            plan = json.loads(Path(file).read_text())
        except (OSError, ValueError):
            return
        if plan["at"] == moment:
            Path(file).unlink()
            FATES[plan["do"]](plan)

    def trained(*arguments: Any) -> Any:
        meet("train")
        return train(*arguments)

    def reserved(*arguments: Any) -> Any:
        meet("before ledger")
        entry = reserve(*arguments)
        meet("after ledger")
        return entry

    loop.train, Ledger.reserve = trained, reserved


def _memory(plan: dict[str, Any]) -> None:
    """Ask for 8 GiB where little more than what is held may be had."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + 64 * 2**20, before[1]))
    try:
        np.ones(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _gpu(plan: dict[str, Any]) -> None:
    """What torch raises when a GPU has gone."""
    import torch

    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def _kill_all(plan: dict[str, Any]) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


FATES: dict[str, Callable[[dict[str, Any]], None]] = {
    "sleep": lambda plan: time.sleep(plan["seconds"]),
    "segfault": lambda plan: os.kill(os.getpid(), signal.SIGSEGV),
    "killed": lambda plan: os.kill(os.getpid(), signal.SIGKILL),
    "memory": _memory,
    "gpu": _gpu,
    "kill all": _kill_all,
}
