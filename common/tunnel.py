"""What travels through the tunnel between SuperNode and SuperLink: one HTTP call and its answer.

Four bytes of length (big endian), a JSON object of that length, then the raw body. gRPC carries it
as one unary call with bytes in and bytes out, so that neither side needs generated code. A large
object's body comes as a piece of its own, sent when the coordinator says (by the call's initial
metadata) that it has room.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from medfl.common.errors import FederationError

METHOD, UPLOAD = "/medfl.Tunnel/Call", "/medfl.Tunnel/Upload"
MIB = 1024 * 1024
# Flower cuts what it sends into objects of at most 5 MiB.
MAX_BODY = 6 * MIB
MAX_HEAD = 16 * 1024
# For `options=` of both ends: gRPC's own limit is 4 MiB.
GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY + 2 * MAX_HEAD),
    ("grpc.max_send_message_length", MAX_BODY + 2 * MAX_HEAD),
)

_CALLS = "/v1/fleet/"
# Each fleet call that a SuperNode makes, with the largest body that it may have. Nothing else
# passes: neither the control nor the runtime calls, which answer on the same port.
ALLOWED: Mapping[str, int] = MappingProxyType(
    {
        _CALLS + "register-node": 4096,
        _CALLS + "activate-node": 4096,
        _CALLS + "deactivate-node": 4096,
        _CALLS + "unregister-node": 4096,
        _CALLS + "send-node-heartbeat": 4096,
        _CALLS + "pull-messages": 4096,
        _CALLS + "push-messages": 2 * MIB,
        _CALLS + "get-run": 4096,
        _CALLS + "get-fab": 4096,
        _CALLS + "push-object": MAX_BODY,
        _CALLS + "pull-object": 4096,
        _CALLS + "confirm-message-received": 4096,
    }
)
PULL = _CALLS + "pull-messages"
PULL_OBJECT, PUSH_OBJECT = _CALLS + "pull-object", _CALLS + "push-object"
# What a SuperNode calls between a message's announcement and having all of it.
FETCH = frozenset(_CALLS + n for n in ("get-run", "get-fab", "pull-object"))
SESSION = "medfl-session"
# On the coordinator's own machine: proves that a call comes from the gateway or the engine.
KEY_HEADER = "x-medfl-key"
HEARTBEAT = _CALLS + "send-node-heartbeat"


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request. id: the same for every attempt at it, so that it takes effect once."""

    id: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """The HTTP response. status 0: nothing yet, ask again with the same id.

    more: follows the body, so that a large object need not be copied to stand behind its head.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    more: bytes = b""


def encode(message: Call | Answer) -> bytes:
    """As bytes."""
    about: dict[str, object] = {"headers": dict(message.headers)}
    if isinstance(message, Call):
        about |= {"id": message.id, "path": message.path}
    else:
        about |= {"status": message.status}
    head = json.dumps(about).encode()
    more = message.more if isinstance(message, Answer) else b""
    return b"".join([len(head).to_bytes(4, "big"), head, message.body, more])


def decode_call(raw: bytes) -> Call:
    """Inverse of `encode`. Raises FederationError for anything malformed."""
    about, headers, body = _split(raw, {"id", "path"})
    call_id, path = about["id"], about["path"]
    if not isinstance(call_id, str) or not isinstance(path, str) or len(call_id) > 64:
        raise FederationError(_MALFORMED)
    return Call(call_id, path, headers, body)


def decode_answer(raw: bytes) -> Answer:
    """Inverse of `encode`. Raises FederationError for anything malformed."""
    about, headers, body = _split(raw, {"status"})
    status = about["status"]
    if type(status) is not int or not (status == 0 or 200 <= status <= 599):
        raise FederationError(_MALFORMED)
    return Answer(status, headers, body)


_MALFORMED = (
    "A message in the tunnel is malformed. Coordinator and hospitals must run the same version of "
    "medfl; compare `--version` on both."
)


def _split(raw: bytes, keys: set[str]) -> tuple[dict[str, object], dict[str, str], bytes]:
    size = int.from_bytes(raw[:4], "big")
    if len(raw) < 4 + size or size > MAX_HEAD:
        raise FederationError(_MALFORMED)
    try:
        about = json.loads(raw[4 : 4 + size])
    except ValueError:
        raise FederationError(_MALFORMED) from None
    if not isinstance(about, dict) or set(about) != keys | {"headers"}:
        raise FederationError(_MALFORMED)
    headers = about["headers"]
    if not isinstance(headers, dict) or not all(isinstance(v, str) for v in headers.values()):
        raise FederationError(_MALFORMED)
    return about, headers, raw[4 + size :]
