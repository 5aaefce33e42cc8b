"""How many calls a second a SuperLink answers behind the gate, with nodes that do nothing else."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flwr.proto import fleet_pb2, heartbeat_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from medfl.common import tunnel
from medfl.common.errors import FederationError
from medfl.common.tunnel import Answer, Call
from medfl.server.engine import Engine
from medfl.server.nodes import activated
from medfl.server.tunnel import Gate

_FLEET = "/v1/fleet/"
_KEY = b"the gate puts its own key here"
_HEADERS = {
    "content-type": PROTOBUF_MEDIA_TYPE,
    "accept": PROTOBUF_MEDIA_TYPE,
    "flwr-package-name": "flwr",
    "flwr-package-version": "1.41.0",
    "flwr-component-name": "SuperNode",
    tunnel.SESSION: "s",
}
# Callers at the same time: the gateway's threads, of which two cores can use few.
_CALLERS = 8


def rates(nodes: int, seconds: float) -> dict[str, float]:
    """Calls a second by kind: `join` (two calls a node), `heartbeat`, `pull` of nothing."""
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as name:
        engine = Engine(Path(name) / "engine")
        engine.start()
        try:
            key = (engine.folder / "engine.key").read_text(encoding="utf-8")
            gate = Gate(engine.address, key, engine.roster)
            try:
                return _measured(gate, nodes, seconds)
            finally:
                gate.close()
        finally:
            engine.stop()


def _measured(gate: Gate, nodes: int, seconds: float) -> dict[str, float]:
    names = [f"site-{i:05}" for i in range(nodes)]
    with ThreadPoolExecutor(_CALLERS) as pool:
        began = time.perf_counter()
        ids = dict(zip(names, pool.map(partial(_joined, gate), names), strict=True))
        found = {"join": 2 * nodes / (time.perf_counter() - began)}
        for kind, ask in (("heartbeat", _beat), ("pull", _pull)):
            work = partial(_busy, gate, ids, ask, seconds)
            began = time.perf_counter()
            done = sum(pool.map(work, range(_CALLERS)))
            found[kind] = done / (time.perf_counter() - began)
    return found


def _joined(gate: Gate, site: str) -> int:
    register = fleet_pb2.RegisterNodeFleetRequest(public_key=_KEY)
    _said(gate.answer(site, _call("register-node", register, "r")))
    activate = fleet_pb2.ActivateNodeRequest(public_key=_KEY, heartbeat_interval=30)
    return activated(_said(gate.answer(site, _call("activate-node", activate, "a"))).body)


def _busy(
    gate: Gate,
    ids: dict[str, int],
    ask: Callable[[Gate, str, int, str], Answer],
    seconds: float,
    caller: int,
) -> int:
    """Ask for one site after another; returns how many calls that were."""
    own = list(ids.items())[caller::_CALLERS] or list(ids.items())
    end, done = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        site, node_id = own[done % len(own)]
        ask(gate, site, node_id, f"{caller}-{done}")
        done += 1
    return done


def _beat(gate: Gate, site: str, node_id: int, number: str) -> Answer:
    asked = heartbeat_pb2.SendNodeHeartbeatRequest(
        node=Node(node_id=node_id), heartbeat_interval=30
    )
    return _said(gate.answer(site, _call("send-node-heartbeat", asked, number)))


def _pull(gate: Gate, site: str, node_id: int, number: str) -> Answer:
    """One look for a message; the gate would hold a caller who waits."""
    asked = fleet_pb2.PullMessagesRequest(node=Node(node_id=node_id))
    answer = gate.answer(site, _call("pull-messages", asked, number), lambda: False)
    return answer if answer.status == 0 else _said(answer)


def _call(name: str, request: object, number: str) -> Call:
    body: bytes = request.SerializeToString()  # type: ignore[attr-defined]
    return Call(number, _FLEET + name, dict(_HEADERS), body)


def _said(answer: Answer) -> Answer:
    if answer.status != 200:
        raise FederationError(f"The engine answered a call with {answer.status}.")
    return answer
