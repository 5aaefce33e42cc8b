"""Calls to a SuperLink that cannot serve them just now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from flwr.app import RecordDict
from flwr.proto import message_pb2
from flwr.supercore.protobuf.client import ProtobufRequestContext

from medfl.common.flower_records import to_record
from medfl.common.messages import Instruction, Reply, pack
from medfl.server import flower, link
from medfl.server.register import Roster

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


def test_an_upload_is_waited_for_as_long_as_something_of_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long the whole takes: 400 MB at 10 Mbit/s are minutes, most of them for the last."""
    monkeypatch.setattr(flower, "_QUIET_S", 0.4)
    roster = Roster()

    class Uploading:
        """Stands for a run with one answer, whose parts are asked for until they never come."""

        def send(self, node_id: int, content: RecordDict, kind: str, group: str) -> str:
            return "m"

        def receive(self, message_id: str, most: int, never: Callable[[], bool]) -> RecordDict:
            for part in range(100):
                assert not never(), f"given up at part {part}"
                if part == 15:
                    break
                roster.moved("north")
                time.sleep(0.05)
            return to_record(pack(Reply(site="north", round=1)))

    roster.arrived("north", 7)
    sites = flower.ConnectedSites(Uploading(), roster, deadline_s=60)  # type: ignore[arg-type]
    instruction = Instruction(kind="round", study_digest="d" * 64, run="r", round=1)
    (reply,) = sites.ask([("north", instruction)])
    assert (reply.site, reply.refusal) == ("north", "")
    assert sites._never_whole("north", "m", time.monotonic() - 1)  # the deadline
    time.sleep(0.5)
    assert sites._never_whole("north", "m", time.monotonic() + 60)  # nothing comes any more
    roster.moved("north")
    assert not sites._never_whole("north", "m", time.monotonic() + 60)
    roster.got("north", ["m"])
    roster.left("north")
    assert sites._never_whole("north", "m", time.monotonic() + 60)  # the node is gone
