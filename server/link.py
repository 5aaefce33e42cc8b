"""Flower's calls as the coordinator makes them: a run that this process executes itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto import (
    control_pb2,
    fab_pb2,
    message_pb2,
    runtime_pb2,
)
from flwr.supercore.constant import (
    TaskType,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.date import now
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from medfl.common.errors import FederationError
from medfl.common.flower_objects import announced_of, arrived, redeemed
from medfl.common.shelf import Shelf
from medfl.common.tunnel import KEY_HEADER

log = logging.getLogger(__name__)

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_TTL_S = 7 * 24 * 3600.0
# A call that the SuperLink cannot serve is repeated for so long.
_BUSY_S, _LOOK_S = 60.0, 0.5


class Link:
    """A SuperLink at a loopback address, for those who know its key. shelf: its large objects."""

    def __init__(self, address: str, key: str, shelf: Shelf) -> None:
        self.address = address
        self.key = key
        self.shelf = shelf

    def start_run(self, bundle: bytes) -> Run:
        """Create a run and take it on, so that nobody else executes it.

        Raises:
            FederationError: Flower refused it.
        """
        try:
            with ControlHttpClient.from_server_address(
                self.address,
                True,
                None,
                [_Key(self.key), RuntimeVersionHttpInterceptor("flwr-cli")],
            ) as control:
                asked = control_pb2.StartRunRequest(fab=fab_pb2.Fab(content=bundle))
                run_id = int(control.StartRun(asked).run_id)
            return self._take(run_id)
        except httpx.HTTPError as error:
            raise FederationError(
                f"The engine did not start the run ({type(error).__name__}). "
                "The reason is in superlink.log in the coordinator's folder."
            ) from error

    def _take(self, run_id: int) -> Run:
        """Acquire the run's task; tasks that an earlier coordinator left are ended."""
        secret = SuperExecAuthHttpInterceptor(
            master_secret=self.key.encode(), protected_methods={_ACQUIRE}
        )
        while True:
            client = _runtime(self.address, self.key, [secret])
            with client:
                found = client.AcquireTask(
                    runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
                )
            if not found.token:
                raise FederationError(f"The engine has no task for its run {run_id}.")
            run = Run(LinkGrid(self.address, found.token, self.key, self.shelf))
            if found.task.run_id == run_id:
                run.begin()
                return run
            run.end(completed=False, details="left by an earlier coordinator")


class LinkGrid(HttpGrid):
    """Flower's grid over a guarded SuperLink, which asks for one reply at a time.

    Replies that nobody has asked for yet stay in the SuperLink's database, not in memory.
    """

    def __init__(self, address: str, token: str, key: str, shelf: Shelf) -> None:
        super().__init__(address, insecure=True, token=token)
        self._shelf = shelf
        self._client = _runtime(address, key, [RuntimeTokenHttpInterceptor(token=token)])

    @property
    def calls(self) -> RuntimeHttpClient:
        """The runtime calls of this run's task."""
        return self._runtime_client

    def pull_one(
        self, message_id: str, max_bytes: int, given_up: Callable[[], bool]
    ) -> Message | None:
        """The reply to a message, or None where there is none yet.

        Flower's own pull waits a second whenever an object is still on its way, and takes any size.
        given_up: whether what is not there will never come.

        Raises:
            UploadBroken: it did not arrive whole. Malformed: it is no message, or too large.
        """
        asked = runtime_pb2.PullAppMessagesRequest(message_ids=[message_id])
        got = self.calls.PullMessages(asked)
        if not got.messages_list:
            return None
        about, tree = got.messages_list[0].metadata, got.message_object_trees[0]
        pull = make_pull_object_fn_protobuf(self.calls.PullObject, self.node, about.run_id)

        def fetch(object_id: str) -> bytes:
            # What is kept needs no call; what is not may be small, on its way, or given up.
            kept = self._shelf.read(object_id)
            return redeemed(self._shelf, object_id, pull(object_id)) if kept is None else kept

        message = arrived(tree, _patient(fetch, given_up), max_bytes, rests=True)
        self.calls.ConfirmMessageReceived(
            message_pb2.ConfirmMessageReceivedRequest(
                node=self.node, run_id=about.run_id, message_object_id=about.message_id
            )
        )
        return message

    def push_one(self, message: Message) -> str:
        """Send a message, and of its objects those that the SuperLink does not have.

        Flower's own push has all of them in memory at once.
        """
        announced = announced_of(message)
        answer = self.calls.PushMessages(announced.request)
        push = make_push_object_fn_protobuf(
            self.calls.PushObject, self.node, message.metadata.run_id, answer.session_id
        )
        announced.push(set(answer.objects_to_push), push, self._shelf)
        return str(answer.message_ids[0]) if answer.message_ids else ""


def _patient(fetch: Callable[[str], bytes], given_up: Callable[[], bool]) -> Callable[[str], bytes]:
    """Waits for an object that is still on its way, however long others of the message take.

    Raises:
        UploadBroken: it does not come.
    """

    def patient(object_id: str) -> bytes:
        wait_s = 0.02
        while True:
            try:
                return fetch(object_id)
            except ObjectUnavailableError:
                if given_up():
                    raise UploadBroken("a part of its answer will not come") from None
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, 0.3)
            except ObjectPullError:
                raise UploadBroken("the engine has lost a part of its answer") from None

    return patient


class UploadBroken(FederationError):
    """A reply that is announced and never complete."""


class Run:
    """One run that this process executes: messages to nodes and their replies."""

    def __init__(self, grid: LinkGrid) -> None:
        self._grid = grid
        self._run_id = 0
        self._beat = HeartbeatSender(self._heartbeat)

    @property
    def run_id(self) -> int:
        """Flower's number of the run."""
        return self._run_id

    def begin(self) -> None:
        """Tell Flower that the run is being executed."""
        given = self._grid.calls.PullTaskInput(runtime_pb2.PullTaskInputRequest())
        run = run_from_proto(given.run)
        self._grid.set_run(run)
        self._run_id = int(run.run_id)
        self._beat.start()

    def send(self, node_id: int, content: RecordDict, message_type: str, group: str) -> str:
        """Send to a node; returns the id to ask for the reply with."""
        address = Metadata(
            run_id=self._run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node_id,
            reply_to_message_id="",
            group_id=group,
            created_at=now().timestamp(),
            ttl=_TTL_S,
            message_type=message_type,
        )
        # Flower's typed constructors take the address from the process, which may run several.
        message = Message(content=content, metadata=address)  # type: ignore[call-overload]
        sent = self._grid.push_one(message)
        if not sent:
            raise FederationError(f"The engine did not take a message for node {node_id}.")
        return sent

    def receive(
        self, message_id: str, max_bytes: int, given_up: Callable[[], bool] = lambda: False
    ) -> RecordDict | Error | None:
        """The reply, an error where Flower gave it up, or None where there is none yet.

        given_up: whether parts that are not there will never come.

        Raises:
            UploadBroken: the reply is there and parts of it never came. Malformed: it is none.
        """
        message = self._grid.pull_one(message_id, max_bytes, given_up)
        if message is None:
            return None
        return message.error if message.has_error() else message.content

    def end(self, *, completed: bool, details: str = "") -> None:
        """Tell Flower that the run is over; nodes drop what they still hold of it."""
        if self._beat.is_running:
            self._beat.stop()
        try:
            self._grid.calls.PushTaskOutput(
                runtime_pb2.PushTaskOutputRequest(
                    sub_status=SubStatus.COMPLETED if completed else SubStatus.FAILED,
                    details=details,
                )
            )
        except httpx.HTTPError as error:
            log.warning("the run could not be closed: %s", type(error).__name__)
        self._grid.close()

    def _heartbeat(self) -> bool:
        try:
            self._grid.calls.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True


class _Key:
    """Adds the key to each call."""

    def __init__(self, key: str) -> None:
        self._key = key

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[KEY_HEADER] = self._key
        return call_next(context)


class _Patient:
    """Repeats a call that the SuperLink cannot serve just now; last in a row of interceptors, since
    the others add headers that may be there only once. What is signed for one use is not repeated.
    """

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        until = time.monotonic() + (0.0 if context.rpc_method == _ACQUIRE else _BUSY_S)
        while True:
            response = call_next(context)
            if not _is_busy(context, response) or time.monotonic() > until:
                return response
            response.close()
            time.sleep(_LOOK_S)


def _is_busy(context: ProtobufRequestContext, response: httpx.Response) -> bool:
    """Its database is locked by another process, or the like: 500, or an object not stored."""
    if response.status_code != 200 or not context.rpc_method.endswith("PushObject"):
        return response.status_code >= 500
    return not message_pb2.PushObjectResponse.FromString(response.content).stored


def _runtime(address: str, key: str, more: list[Any]) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[
            _Key(key),
            RuntimeVersionHttpInterceptor("flwr-serverapp"),
            *more,
            _Patient(),
        ],
        retry_invoker=make_simple_http_retry_invoker(),
    )
