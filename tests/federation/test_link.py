"""Calls to a SuperLink that cannot serve them just now."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from flwr.proto import message_pb2
from flwr.supercore.protobuf.client import ProtobufRequestContext

from medfl.server import link

NOT_STORED = message_pb2.PushObjectResponse(stored=False).SerializeToString()
STORED = message_pb2.PushObjectResponse(stored=True).SerializeToString()


def context(method: str) -> ProtobufRequestContext:
    request = httpx.Request("POST", "http://127.0.0.1/x")
    return ProtobufRequestContext(f"/flwr.proto.Runtime/{method}", object(), request)  # type: ignore[arg-type]


def answered(method: str, *answers: tuple[int, bytes]) -> tuple[int, int]:
    """The status that came out in the end, and how many calls that took."""
    waiting: Iterator[tuple[int, bytes]] = iter(answers)
    calls = []

    def send(context: ProtobufRequestContext) -> httpx.Response:
        calls.append(context)
        status, content = next(waiting)
        return httpx.Response(status, content=content, request=context.request)

    return link._Patient().intercept(context(method), send).status_code, len(calls)


@pytest.fixture(autouse=True)
def no_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_LOOK_S", 0.0)


def test_a_call_that_fails_on_their_side_is_repeated() -> None:
    assert answered("PullMessages", (500, b""), (503, b""), (200, b"")) == (200, 3)


def test_an_object_that_was_not_stored_is_sent_again() -> None:
    assert answered("PushObject", (200, NOT_STORED), (200, STORED)) == (200, 2)


def test_what_is_refused_is_not_asked_again() -> None:
    assert answered("PullMessages", (403, b""), (200, b"")) == (403, 1)


def test_what_is_signed_for_one_use_is_used_once() -> None:
    assert answered("AcquireTask", (500, b""), (200, b"")) == (500, 1)


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_BUSY_S", 0.0)
    assert answered("PullMessages", (500, b""), (200, b"")) == (500, 1)


def test_parts_that_will_not_come_are_not_waited_for() -> None:
    from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError

    from medfl.server.link import UploadBroken, _patient

    asked = []

    def absent(object_id: str) -> bytes:
        asked.append(object_id)
        raise ObjectUnavailableError(object_id)

    with pytest.raises(UploadBroken):
        _patient(absent, lambda: True)("x")
    assert asked == ["x"]
    assert _patient(lambda object_id: b"here", lambda: True)("x") == b"here"
