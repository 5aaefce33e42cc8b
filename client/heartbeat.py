"""Answers to the SuperNode's heartbeats in a form that these survive."""

from __future__ import annotations

from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from medfl.common.tunnel import Answer


def survivable(answer: Answer) -> Answer:
    """The answer to a heartbeat in a form that the SuperNode survives.

    Its heartbeats end for good, and silently, at an answer that is none or says that it is not
    known; from then on the SuperLink takes it for gone. 503: it tries again. 401: it starts anew.
    """
    try:
        known = SendNodeHeartbeatResponse.FromString(answer.body).success
    except DecodeError:
        return Answer(503)
    return answer if known else Answer(401)
