"""What medfl relies on in Flower and Flower does not promise. Each fails loudly when that changes.

Where one fails after a new version of flwr: read the file that it names, then change the adapter
(server/link.py, server/nodes.py, server/superlink.py, client/tasks.py, client/supernode.py).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from base64 import b64decode
from importlib.metadata import version

import flwr.supernode.fleet_http_client as fleet_client
import flwr.supernode.start_client_internal as supernode_loop
import numpy as np
import pytest
from flwr.app import Array, Message, Metadata, RecordDict
from flwr.common.config import get_fab_config, get_fused_config_from_fab
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import Run as FlowerRun
from flwr.superlink.config_loader import SuperLinkLifespanConfig

from medfl.common import resting
from medfl.common.bundle import study_bundle
from medfl.common.flower_objects import Malformed, arrived, fixed
from medfl.common.flower_records import from_record, to_record
from medfl.common.messages import Envelope
from medfl.common.tunnel import ALLOWED, MAX_BODY
from medfl.server.nodes import _REQUESTS, NodeKey, parsed, speakers


def test_the_pinned_flower_is_the_one_that_was_read() -> None:
    assert version("flwr").startswith("1.41.")


def test_a_supernode_makes_exactly_the_calls_that_the_tunnel_lets_through() -> None:
    paths = set(re.findall(r'path="([^"]+)"', inspect.getsource(fleet_client)))
    assert paths == set(ALLOWED)


def test_each_fleet_call_has_the_request_that_the_gateway_reads() -> None:
    assert set(_REQUESTS) == {path.rsplit("/", 1)[1] for path in ALLOWED}
    client = fleet_client.FleetHttpClient
    taken = {
        typing.removesuffix("]").rsplit(".", 1)[-1]
        for method in vars(client).values()
        if inspect.isfunction(method)
        for typing in [str(inspect.signature(method).parameters["request"].annotation)]
    }
    assert {kind.__name__ for kind in _REQUESTS.values()} == {
        t.replace("<class '", "").replace("'>", "").rsplit(".", 1)[-1] for t in taken
    }


@pytest.mark.parametrize("name", sorted(set(_REQUESTS) - {"register-node", "activate-node"}))
def test_every_call_but_the_first_two_names_its_node(name: str) -> None:
    request = _REQUESTS[name]()
    if name in ("deactivate-node", "unregister-node"):
        request.node_id = 7
    else:
        request.node.node_id = 7
    assert speakers(name, parsed(name, request.SerializeToString())) == {7}


def test_flowers_loop_sleeps_through_the_module_that_is_replaced() -> None:
    tree = ast.parse(inspect.getsource(supernode_loop))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "time"
    }
    assert used == {"sleep"}


def test_flower_takes_the_bundle_and_finds_the_study_in_it() -> None:
    bundle = study_bundle("ab" * 32)
    assert bundle == study_bundle("ab" * 32) != study_bundle("cd" * 32)
    assert (
        get_fab_config(bundle)["tool"]["flwr"]["app"]["components"]["clientapp"] == "nothing:here"
    )
    run = FlowerRun.create_empty(1)
    assert get_fused_config_from_fab(bundle, run) == {"study": "ab" * 32}


def test_flower_accepts_the_gateways_signature() -> None:
    key = NodeKey(b"secret", "north")
    headers = key.headers()
    assert b64decode(headers["flwr-public-key"]) == key.public
    assert verify_signature(
        bytes_to_public_key(key.public),
        headers["flwr-timestamp"].encode(),
        b64decode(headers["flwr-signature"]),
    )


def test_a_sites_node_key_is_its_own_and_the_same_after_a_restart() -> None:
    assert NodeKey(b"secret", "north").public == NodeKey(b"secret", "north").public
    assert NodeKey(b"secret", "north").public != NodeKey(b"secret", "south").public
    assert NodeKey(b"secret", "north").public != NodeKey(b"other", "north").public


def test_the_superlink_is_configured_in_full() -> None:
    """A new field could be a new way in; server/superlink.py must say what it is to be."""
    assert {f.name for f in dataclasses.fields(SuperLinkLifespanConfig)} == {
        "control_address",
        "health_server_address",
        "host",
        "port",
        "insecure",
        "certificates",
        "superexec_auth_secret",
        "authn_plugin",
        "event_log_plugin",
        "fleet_event_log_plugin",
        "enable_event_log",
        "artifact_provider",
        "enable_supernode_auth",
        "fleet_api_type",
        "fleet_api_address",
        "simulation",
        "ssl_ca_certfile",
        "ssl_certfile",
        "ssl_keyfile",
        "database",
        "isolation",
        "runtime_dependency_install",
    }


def test_a_supernode_retries_what_the_forwarder_may_answer() -> None:
    source = inspect.getsource(inspect.getmodule(make_simple_http_retry_invoker))
    for code in ("SERVICE_UNAVAILABLE", "UNAUTHORIZED", "FORBIDDEN"):
        assert code in source


def test_objects_are_pulled_with_the_back_off_that_is_asked_for() -> None:
    known = inspect.signature(inflatable_utils.pull_objects).parameters
    assert {"initial_backoff", "backoff_cap", "max_time", "max_tries_per_object"} <= set(known)


def test_a_chunk_fits_into_the_tunnel() -> None:
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 4096 <= MAX_BODY


# --------------------------------------------------------------------- messages and their objects


def message(arrays: dict[str, np.ndarray]) -> Message:
    record = to_record(Envelope("{}", {"delta": arrays}))
    address = Metadata(1, "", 2, 1, "x", "1", 1.0, 60.0, "train.round")
    made = Message(content=record, metadata=address)
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def objects(of: Message) -> dict[str, bytes]:
    return {name: obj.deflate() for name, obj in get_all_nested_objects(of).items()}


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize("n", [3, 3_000_000])
def test_arrays_survive_the_way_through_flowers_objects(
    n: int, rests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones travel in the description, large ones in chunks."""
    monkeypatch.setattr(resting, "IN_MEMORY_BYTES", 8)
    sent = {"w": np.arange(n, dtype=np.float32), "steps": np.asarray(5), "e": np.zeros((0, 2))}
    made = message(sent)
    contents = objects(made)
    assert len(contents) == (3 if n == 3 else 8)
    got = arrived(get_object_tree(made), contents.__getitem__, 100_000_000, rests=rests)
    arrays = from_record(got.content).arrays["delta"]
    assert (resting.rested(arrays) is arrays) == (rests and n > 3)
    assert set(arrays) == set(sent)
    for name, array in sent.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert np.array_equal(arrays[name], array)


def bomb(times: int) -> tuple[ObjectTree, dict[str, bytes]]:
    """A message whose array names its one chunk many times."""
    made = message({"w": np.zeros(500_000, dtype=np.float32)})
    contents = objects(made)
    (old,) = [i for i, c in contents.items() if c.startswith(b"Array ")]
    content = contents[old]
    head, body = content.split(b"\x00", 1)
    about = json.loads(body)
    about["arraychunk_ids"] = about["arraychunk_ids"] * times
    about["shape"] = [about["shape"][0] * times]
    body = json.dumps(about).encode()
    kind, children, _ = head.decode().split(" ")
    new = f"{kind} {children} {len(body)}".encode() + b"\x00" + body
    return get_object_tree(made), contents | {old: new}


def test_a_chunk_that_is_named_many_times_is_refused_before_it_is_put_together() -> None:
    tree, contents = bomb(1)
    assert isinstance(arrived(tree, contents.__getitem__, 10_000_000), Message)
    tree, contents = bomb(100)
    assert sum(map(len, contents.values())) < 3_000_000
    asked: list[str] = []

    def fetch(object_id: str) -> bytes:
        asked.append(object_id)
        return contents[object_id]

    with pytest.raises(Malformed, match="memory"):
        arrived(tree, fetch, 10_000_000)
    # Not even its chunk was fetched.
    assert not [i for i in asked if contents[i].startswith(b"ArrayChunk")]


@pytest.mark.parametrize(
    "damage", ["gone", "cut", "index", "garbage", "shape", "chunk", "stranger"]
)
def test_objects_that_do_not_belong_together_are_refused(damage: str) -> None:
    made = message({"w": np.zeros(500_000, dtype=np.float32)})
    contents = objects(made)
    (array,) = [i for i, c in contents.items() if c.startswith(b"Array ")]
    (chunk,) = [i for i, c in contents.items() if c.startswith(b"ArrayChunk ")]
    tree = get_object_tree(made)
    if damage == "gone":
        del contents[array]
    elif damage == "shape":
        contents[array] = contents[array].replace(b'"shape": [2', b'"shape": [1')
    elif damage == "chunk":
        contents[chunk] = contents[chunk][:-5]
    elif damage == "stranger":
        tree = ObjectTree(object_id=made.object_id)
    elif damage == "cut":
        contents[array] = contents[array][:-5]
    elif damage == "index":
        contents[array] = contents[array].replace(b'"arraychunk_ids": [0', b'"arraychunk_ids": [9')
    else:
        contents[array] = b"\xff\x00\xff"
    with pytest.raises(Malformed):
        arrived(tree, contents.__getitem__, 100_000_000)


def test_chunks_are_hashed_once_and_have_flowers_ids() -> None:
    made = message({"w": np.arange(3_000_000, dtype=np.float32)})
    before = {i: o.deflate() for i, o in get_all_nested_objects(made).items()}
    again = Message(content=fixed(made.content), metadata=made.metadata)
    assert {i: o.deflate() for i, o in get_all_nested_objects(again).items()} == before


def test_an_array_of_flowers_own_making_is_refused() -> None:
    """Its .npy header could declare what its bytes are not."""
    from flwr.app import ArrayRecord, ConfigRecord

    from medfl.common.errors import FederationError

    record = RecordDict({"about": ConfigRecord({"json": "{}"})})
    record["delta"] = ArrayRecord({"w": Array(np.zeros(3))})
    with pytest.raises(FederationError, match="form that medfl does not send"):
        from_record(record)
    for raw in (b"", b"\x80\x04.", b"\xff" * 64, b"\x08" + b"\0" * 7 + b'{"a":1}'):
        broken = RecordDict({"about": ConfigRecord({"json": "{}", "delta": raw})})
        with pytest.raises(FederationError, match="damaged"):
            from_record(broken)
