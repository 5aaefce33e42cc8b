"""The fleet calls of hospitals' nodes, as the gateway reads, rewrites and signs them.

A node's key pair is the coordinator's: the certificate of the tunnel says which hospital speaks,
and the gateway signs for that hospital's node. So a node keeps its id over restarts, clocks of
hospitals do not matter to Flower's signatures, and no hospital can sign for another.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
)
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from medfl.common.errors import FederationError
from medfl.common.shelf import ticket


class NodeKey:
    """The key pair with which the gateway signs for one hospital's node."""

    def __init__(self, secret: bytes, site: str) -> None:
        # 47 bytes are below the order of the curve, which is a little less than 2^384.
        drawn = HKDF(hashes.SHA256(), 47, salt=b"medfl node", info=site.encode()).derive(secret)
        self._private = ec.derive_private_key(int.from_bytes(drawn, "big") + 1, ec.SECP384R1())
        self.public = public_key_to_bytes(self._private.public_key())

    def headers(self) -> dict[str, str]:
        """Flower's proof that a call comes from the node, fresh for each call."""
        at = now().isoformat()
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public).decode(),
            TIMESTAMP_HEADER: at,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(
                sign_message(self._private, at.encode())
            ).decode(),
        }


# An answer that holds no object is shorter; a chunk need not be parsed to see that it is there.
_SHORT = 64
_REQUESTS: Mapping[str, Any] = {
    "register-node": fleet_pb2.RegisterNodeFleetRequest,
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "unregister-node": fleet_pb2.UnregisterNodeFleetRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "get-run": run_pb2.GetRunRequest,
    "get-fab": fab_pb2.GetFabRequest,
    "push-object": message_pb2.PushObjectRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}


def with_key(call: str, body: bytes, public: bytes) -> bytes:
    """A registration or activation, for the gateway's key instead of the SuperNode's own.

    Raises:
        FederationError: not such a request.
    """
    request = parsed(call, body)
    request.public_key = public
    return bytes(request.SerializeToString(deterministic=True))


def speakers(call: str, request: Any) -> set[int]:
    """All node ids that a parsed call claims to speak for."""
    if call in ("deactivate-node", "unregister-node"):
        return {int(request.node_id)}
    claimed = {int(request.node.node_id)}
    if call == "push-messages":
        claimed |= {int(m.metadata.src_node_id) for m in request.messages_list}
    return claimed


def answered(body: bytes) -> list[str]:
    """Ids of the messages that a push-messages call answers."""
    request = parsed("push-messages", body)
    return [str(m.metadata.reply_to_message_id) for m in request.messages_list]


def delivered(answer: bytes) -> list[str]:
    """Ids of the messages in the answer to a pull-messages call."""
    got = fleet_pb2.PullMessagesResponse.FromString(answer)
    return [str(m.metadata.message_id) for m in got.messages_list]


def trees(answer: bytes) -> dict[str, frozenset[str]]:
    """Ids of all objects of each message in the answer to a pull-messages call."""
    got = fleet_pb2.PullMessagesResponse.FromString(answer)
    return {
        str(tree.object_id): frozenset(node.object_id for node in iterate_object_tree(tree))
        for tree in got.message_object_trees
    }


def lacking(answer: bytes) -> list[str]:
    """Ids of the objects that the answer to a push-messages call asks for."""
    return list(fleet_pb2.PushMessagesResponse.FromString(answer).objects_to_push)


def confirmed(body: bytes) -> str:
    """The message that a confirm-message-received call is about."""
    return str(parsed("confirm-message-received", body).message_object_id)


def with_ticket(request: Any) -> bytes:
    """A parsed push-object call with a ticket in the place of the content."""
    request.object_content = ticket(request.object_id)
    return bytes(request.SerializeToString())


def is_ticket(answer: bytes, object_id: str) -> bool:
    """Whether the answer to a pull-object call is the object's ticket."""
    if len(answer) > 4 * _SHORT:
        return False
    got = message_pb2.PullObjectResponse.FromString(answer)
    return bool(got.object_content == ticket(object_id))


def available(size: int) -> bytes:
    """What the answer to a pull-object call begins with; an object of that size follows.

    Fields 1 and 2 (found, available), then field 3 (the bytes) with its length as a varint:
    protobuf.dev/programming-guides/encoding.
    """
    length = bytearray()
    while size >= 128:
        length.append(size % 128 | 128)
        size //= 128
    return b"\x08\x01\x10\x01\x1a" + bytes([*length, size])


def activated(answer: bytes) -> int:
    """The node id in the answer to an activate-node call."""
    return int(fleet_pb2.ActivateNodeResponse.FromString(answer).node_id)


def deactivation(node_id: int) -> bytes:
    """A deactivate-node call."""
    return bytes(fleet_pb2.DeactivateNodeRequest(node_id=node_id).SerializeToString())


def registration(public: bytes) -> bytes:
    """A register-node call."""
    return bytes(fleet_pb2.RegisterNodeFleetRequest(public_key=public).SerializeToString())


def on_its_way(answer: bytes) -> bool:
    """Whether the answer to a pull-object call says: announced, and not yet there."""
    if len(answer) > _SHORT:
        return False
    got = message_pb2.PullObjectResponse.FromString(answer)
    return bool(got.object_found and not got.object_available)


def not_stored(answer: bytes) -> bool:
    """Whether the answer to a push-object call says so: the database is locked, or the like."""
    return not message_pb2.PushObjectResponse.FromString(answer).stored


COMING = bytes(
    message_pb2.PullObjectResponse(object_found=True, object_available=False).SerializeToString()
)
NOT_STORED = bytes(message_pb2.PushObjectResponse(stored=False).SerializeToString())


def parsed(call: str, body: bytes) -> Any:
    """A call's request. Raises FederationError where it is none."""
    try:
        return _REQUESTS[call].FromString(body)
    except (DecodeError, KeyError):
        raise FederationError(f"A {call} call is malformed.") from None
