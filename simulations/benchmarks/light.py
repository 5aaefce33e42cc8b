"""Hospitals that do not train, many to a process: `python -m medfl.simulations.benchmarks.light`.

They enrol, approve and seal as real ones do and speak to the coordinator's gateway the way that a
SuperNode does, but keep nothing of the model that they receive and answer with made-up updates.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    get_object_type_from_object_content,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from medfl.client import consent, enrolment
from medfl.client.approved import Approved, hospitals
from medfl.client.hospital import answer
from medfl.client.premises import Home
from medfl.client.reading import Reading, site_word
from medfl.client.tunnel import Forwarder
from medfl.common.errors import FederationError
from medfl.common.flower_records import to_record
from medfl.common.messages import Envelope, Instruction, Reply, pack, unpack_instruction
from medfl.common.packing import pack_exactly
from medfl.common.seeds import derive
from medfl.common.tensors import Array

_FLEET = "/v1/fleet/"
_KEY = b"the gateway puts its own key here"
_HEADERS = {
    "content-type": PROTOBUF_MEDIA_TYPE,
    "accept": PROTOBUF_MEDIA_TYPE,
    "flwr-package-name": "flwr",
    "flwr-package-version": "1.41.0",
    "flwr-component-name": "SuperNode",
}
# Updates that are made or sent at the same time: as many as the machine has cores to spare.
_AT_ONCE = threading.Semaphore(2)
# Deviation of the made-up updates' numbers.
STEP = 1e-3


def update(site: str, round_: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """The made-up update of a hospital, float32."""
    rng = np.random.default_rng(derive(0, "light", site, "round", round_))
    return {
        name: np.float32(STEP) * rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


class LightHospital:
    """One hospital on its own line. shapes: of the model's parameters."""

    def __init__(self, state: Path, site_file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self._home = Home(state)
        self._finder: Approved = hospitals(
            json.dumps({"state": str(state), "site": str(site_file)})
        )
        self._shapes = shapes
        self.name = self._home.enrolment().site

    def approve(self) -> None:
        """What `medfl-client studies` and `approve` do."""
        with enrolment.line_to(self._home) as line:
            (published,) = consent.fetch(self._home, line)
            study = consent.by_digest(self._home, published.digest)
            from medfl.client.data.own import own_cohort
            from medfl.common.site import load_site

            site = load_site(self._finder.site_file)
            cohort = own_cohort(site, study)
            word = site_word(self._home.signing_key(), site)
            reading = Reading(cohort.digest, len(cohort.positions("train")), word)
            consent.approve(self._home, study, reading, 30)
            consent.send_all(self._home, line)

    def serve(self, connected: Callable[[], None]) -> None:
        """Answer until the process ends."""
        with enrolment.line_to(self._home) as line:
            forwarder = Forwarder(line.channel)
            enrolment.greet(self._home, line, forwarder.session, "0")
            call = partial(_call, forwarder)
            call("register-node", fleet_pb2.RegisterNodeFleetRequest(public_key=_KEY))
            asked = fleet_pb2.ActivateNodeRequest(public_key=_KEY, heartbeat_interval=30)
            node = Node(
                node_id=call("activate-node", asked, fleet_pb2.ActivateNodeResponse).node_id
            )
            threading.Thread(target=_beat, args=(call, node), daemon=True).start()
            connected()
            pull = fleet_pb2.PullMessagesRequest(node=node)
            while True:
                got = call("pull-messages", pull, fleet_pb2.PullMessagesResponse)
                if got.messages_list:
                    with _AT_ONCE:
                        self._answer(call, node, got.messages_list[0], got.message_object_trees[0])

    def _answer(self, call: Callable[..., Any], node: Node, proto: Any, tree: Any) -> None:
        run_id, text = proto.metadata.run_id, ""
        for object_id in dict.fromkeys(t.object_id for t in iterate_object_tree(tree)):
            asked = message_pb2.PullObjectRequest(node=node, run_id=run_id, object_id=object_id)
            content = call("pull-object", asked, message_pb2.PullObjectResponse).object_content
            text = _description(object_id, content) or text
        received = message_pb2.ConfirmMessageReceivedRequest(
            node=node, run_id=run_id, message_object_id=tree.object_id
        )
        call("confirm-message-received", received)
        message = message_from_proto(proto)
        message.metadata.__dict__["_message_id"] = tree.object_id
        record = to_record(self._reply(text))
        _send(call, node, Message(record, reply_to=message))

    def _reply(self, text: str) -> Envelope:
        asked = unpack_instruction(Envelope(text, {}))
        hospital = self._finder(_Context(asked))
        if asked.kind == "prepare":
            reply = answer(hospital, asked)
        else:
            reply = Reply(site=self.name, round=asked.round, cohort=hospital.cohort.digest)
        if asked.kind == "round":
            delta = pack_exactly(update(self.name, asked.round, self._shapes))
            cases = len(hospital.cohort.positions("train"))
            reply = replace(reply, n_cases=cases, steps=1, loss=1.0, delta=delta)
        return self._finder.seal(text, asked, pack(reply))


class _Context:
    """What `Approved` wants to know of Flower's context."""

    def __init__(self, asked: Instruction) -> None:
        self.run_config = {"study": asked.study_digest, "run": asked.run}


def _beat(call: Callable[..., Any], node: Node) -> None:
    """A SuperNode's heartbeats: a node without them is given up."""
    while True:
        time.sleep(15)
        call(
            "send-node-heartbeat",
            heartbeat_pb2.SendNodeHeartbeatRequest(node=node, heartbeat_interval=30),
        )


def _description(object_id: str, content: bytes) -> str:
    """The JSON text of an envelope, if this object holds it."""
    if get_object_type_from_object_content(content) != ConfigRecord.__qualname__:
        return ""
    record = inflate_object_from_contents(object_id, {object_id: content})
    found = record.get("json", "") if isinstance(record, ConfigRecord) else ""
    return found if isinstance(found, str) else ""


def _send(call: Callable[..., Any], node: Node, message: Message) -> None:
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        objects, tree = get_all_nested_objects(message), get_object_tree(message)
        pushed = fleet_pb2.PushMessagesRequest(
            node=node,
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        told = call("push-messages", pushed, fleet_pb2.PushMessagesResponse)
        for object_id, found in objects.items():
            if object_id in set(told.objects_to_push):
                sent = message_pb2.PushObjectRequest(
                    node=node,
                    run_id=message.metadata.run_id,
                    session_id=told.session_id,
                    object_id=object_id,
                    object_content=found.deflate(),
                )
                call("push-object", sent)


def _call(forwarder: Forwarder, name: str, request: Any, answer_type: Any = None) -> Any:
    """One fleet call. Raises FederationError where the coordinator refuses it."""
    got = forwarder.forward(_FLEET + name, dict(_HEADERS), request.SerializeToString(), _no_tick)
    if got.status != 200:
        raise FederationError(f"{name} was answered with {got.status}")
    return None if answer_type is None else answer_type.FromString(got.body)


def _no_tick() -> None:
    """Nobody waits behind a light hospital."""


def main() -> int:
    """The child. Arguments: JSON with `shapes`, and `hospitals`: address, token, state, site."""
    about = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
    threads = []
    there = threading.Semaphore(0)
    for one in about["hospitals"]:
        hospital = LightHospital(Path(one["state"]), Path(one["site"]), shapes)
        hospital.approve()
        threads.append(threading.Thread(target=hospital.serve, args=(there.release,), daemon=True))
        threads[-1].start()
    for _ in threads:
        there.acquire()
    print("all connected", flush=True)
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
