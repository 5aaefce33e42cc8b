"""The tasks that this site's SuperNode has for a process of ours, over Flower's Runtime API."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SubStatus
from flwr.proto import runtime_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from medfl.common.errors import FederationError
from medfl.common.flower_objects import Malformed, announced_of, arrived, fixed, redeemed
from medfl.common.flower_records import as_text, from_record, from_text, to_record
from medfl.common.messages import Instruction, Reply, pack, unpack_instruction
from medfl.common.shelf import Shelf

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
# More than any instruction; an array may name one chunk any number of times.
_MAX_MESSAGE = 8 * 1024**3
_PUSHES = 3
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class NodeGone(FederationError):
    """The SuperNode of this site cannot be reached, or has dropped the task."""


class Tasks:
    """The tasks of this site's SuperNode, for who knows its secret.

    given_up: whether the SuperNode has stopped fetching what it lacks of a message. shelf: where
        its large objects lie.
    """

    def __init__(
        self,
        address: str,
        secret: str,
        given_up: Callable[[], bool] = lambda: False,
        shelf: Shelf | None = None,
    ) -> None:
        self._address, self._given_up, self._shelf = address, given_up, shelf
        signing = SuperExecAuthHttpInterceptor(
            master_secret=secret.encode(), protected_methods={_ACQUIRE}
        )
        self._calls = _runtime(address, signing)

    def next(self) -> Task | None:
        """Take the oldest waiting task; None where there is none.

        Raises:
            NodeGone: try again, perhaps at another address.
        """
        asked = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        try:
            found = self._calls.AcquireTask(asked)
            if not found.token:
                return None
            return Task(self._address, found.token, self._given_up, self._shelf)
        except httpx.HTTPError as error:
            raise NodeGone(f"no task could be taken ({type(error).__name__})") from error

    def close(self) -> None:
        """Close the connection."""
        self._calls.close()


class Task:
    """One message to this site, and its answer. What code came with it is bytes and stays bytes."""

    def __init__(
        self, address: str, token: str, given_up: Callable[[], bool], shelf: Shelf | None
    ) -> None:
        self._shelf = shelf
        self._calls = _runtime(address, RuntimeTokenHttpInterceptor(token=token))
        self._beat = HeartbeatSender(self._heartbeat)
        self._given_up = given_up
        given = self._call(self._calls.PullTaskInput, runtime_pb2.PullTaskInputRequest())
        self._context = given.context
        self.run_id, self.node_id = int(given.context.run_id), int(given.context.node_id)
        self.bundle = bytes(given.fab.content)
        self._beat.start()
        try:
            self.message = self._message()
        except NodeGone:
            self.drop()
            raise

    def _message(self) -> Message:
        """The message itself; Flower announces a task a little before its message is there."""
        for _ in range(500):
            got = self._call(self._calls.PullMessages, runtime_pb2.PullAppMessagesRequest())
            if got.messages_list:
                break
            time.sleep(0.02)
        else:
            raise NodeGone("a task came without a message")
        tree, node = got.message_object_trees[0], Node(node_id=self.node_id)
        pull = make_pull_object_fn_protobuf(self._calls.PullObject, node, self.run_id)
        confirm = make_confirm_message_received_fn_protobuf(
            self._calls.ConfirmMessageReceived, node, self.run_id
        )

        def pull_when_it_is_there(object_id: str) -> bytes:
            wait_s = 0.02
            while True:
                try:
                    return redeemed(self._shelf, object_id, pull(object_id))
                except ObjectUnavailableError:
                    if self._given_up():
                        raise NodeGone("a message's run ended before all of it was here") from None
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, 0.5)

        try:
            message = arrived(tree, pull_when_it_is_there, _MAX_MESSAGE)
            confirm(tree.object_id)
        except (httpx.HTTPError, ObjectPullError, Malformed) as error:
            raise NodeGone(f"a message did not arrive ({type(error).__name__})") from error
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def instruction(self) -> Instruction:
        """What is asked. Raises FederationError for anything that is no instruction."""
        return unpack_instruction(from_record(self.message.content))

    def payload(self) -> list[bytes | memoryview]:
        """The message for another process, in pieces."""
        return as_text(self.message)

    def answer(self, reply: Reply | bytes | bytearray) -> None:
        """Hand the answer to the SuperNode. bytes: a reply as `run_payload` returns it.

        Raises:
            NodeGone: the SuperNode is gone, and the answer with it.
        """
        if isinstance(reply, Reply):
            message = Message(to_record(pack(reply)), reply_to=self.message)
        else:
            message = from_text(memoryview(reply))
        try:
            self._push_again(message)
            self._end(SubStatus.COMPLETED)
        except ObjectPushError as error:
            self.drop()  # the coordinator hears it and asks again
            raise NodeGone("an answer was not taken in whole") from error
        except httpx.HTTPError as error:
            raise NodeGone(f"an answer was not taken ({type(error).__name__})") from error

    def _push_again(self, message: Message) -> None:
        """A message that was announced twice, by a retry, is taken in its last push alone."""
        for _ in range(_PUSHES - 1):
            try:
                return self._push(message)
            except ObjectPushError:
                log.warning("an answer was announced twice; it is pushed again")
        self._push(message)

    def _push(self, message: Message) -> None:
        """Flower's own push keeps each large object in memory four times."""
        fixed(message.content)
        announced = announced_of(message)
        answer = self._calls.PushMessages(announced.request)
        push = make_push_object_fn_protobuf(
            self._calls.PushObject, Node(node_id=self.node_id), self.run_id, answer.session_id
        )
        announced.push(set(answer.objects_to_push), push, self._shelf)

    def drop(self) -> None:
        """Give it up without an answer."""
        try:
            self._end(SubStatus.FAILED)
        except httpx.HTTPError as error:
            log.debug("a task could not be given back: %s", type(error).__name__)

    def _end(self, status: str) -> None:
        try:
            self._calls.PushTaskOutput(runtime_pb2.PushTaskOutputRequest(sub_status=status))
        finally:
            if self._beat.is_running:
                self._beat.stop()
            self._calls.close()

    def _heartbeat(self) -> bool:
        try:
            self._calls.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    @staticmethod
    def _call(call: Callable[[T], R], request: T) -> R:
        try:
            return call(request)
        except httpx.HTTPError as error:
            raise NodeGone(f"a task was not given ({type(error).__name__})") from error


def run_payload(
    app: ClientApp, payload: memoryview, run_id: int, node_id: int, study: str
) -> bytes:
    """Run the installed app on a message of `Task.payload`; the reply as bytes.

    study: the digest that the task's bundle names; the app finds it in the context's run_config.
    """
    message = from_text(payload)
    context = Context(run_id, node_id, {}, RecordDict(), {"study": study})
    return b"".join(as_text(app(message, context)))


def _runtime(address: str, more: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor("flwr-clientapp"), more],
    )
