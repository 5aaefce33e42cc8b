"""Flower's Grid in one process: messages go to a pool of workers instead of a SuperLink."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from time import time
from uuid import uuid4

from flwr.app import DEFAULT_TTL, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from medfl.common.errors import FederationError
from medfl.common.flower_records import as_text, from_text, joined, parted
from medfl.common.recent import Recent
from medfl.simulations.pool import Pool, WorkerDied

_WORKER_DIED = 3


class Worker:
    """What a pool's process does: run the ClientApp on messages whose content it was given before.

    The app's context names the run and the node and holds nothing else.
    """

    def __init__(self, app: ClientApp) -> None:
        self._app = app
        self._content = RecordDict()

    def keep(self, content: bytes | None) -> None:
        """The content of the messages that come next."""
        self._content = RecordDict() if content is None else parted(memoryview(content))[1]

    def work(self, task: bytes) -> bytes:
        """The answer to the message whose address `task` is."""
        address = message_from_proto(ProtoMessage.FromString(task)).metadata
        context = Context(address.run_id, address.dst_node_id, {}, RecordDict(), {})
        return b"".join(as_text(self._app(_message(self._content, address), context)))


class LocalGrid(Grid):
    """A Grid whose nodes are the sites 1..n of one simulated run.

    Only as many messages exist at a time as workers can take, and replies come in the order in
    which the messages were given: memory does not grow with the number of sites, and sums do not
    depend on who was faster. Messages of one content (the same object) share it in the workers.
    """

    def __init__(self, pool: Pool, run_id: int, n_nodes: int) -> None:
        self._pool, self._n_nodes = pool, n_nodes
        self._run = Run.create_empty(run_id)
        self._futures: dict[str, tuple[Message, Future[bytes]]] = {}
        self._packed = Recent[RecordDict, bytes](lambda content: b"".join(joined(b"", content)))
        # Flower's message constructor asks who this process is; each grid addresses its own
        # messages, so that several runs can share the process.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, run_id, 0

    def set_run(self, run: Run) -> None:
        """Work for another run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that this grid works for."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """1..n, in the order of the sites."""
        return range(1, self._n_nodes + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the workers; returns their ids."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there by now; each is handed out once."""
        ready = [i for i in message_ids if i in self._futures and self._futures[i][1].done()]
        return [self._wait(message_id) for message_id in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Replies in the order of the messages, as they come. `timeout` (s) is for each reply."""
        window: deque[str] = deque()
        source = iter(messages)
        while True:
            while len(window) < len(self._pool) + 1 and (m := next(source, None)) is not None:
                window.append(self._push(m))
            if not window:
                return
            yield self._wait(window.popleft(), timeout)

    def _push(self, message: Message) -> str:
        if not 1 <= message.metadata.dst_node_id <= self._n_nodes:
            raise FederationError(f"There is no node {message.metadata.dst_node_id} in this run.")
        address = self._address(message)
        # What is sent, and kept for an error reply, is the address alone, not the weights.
        bare = _message(RecordDict(), address)
        task = bytes(message_to_proto(bare).SerializeToString())
        future = self._pool.submit(task, self._packed(message.content))
        self._futures[address.message_id] = (bare, future)
        return address.message_id

    def _address(self, message: Message) -> Metadata:
        return Metadata(
            run_id=self._run.run_id,
            message_id=str(uuid4()),
            src_node_id=0,
            dst_node_id=message.metadata.dst_node_id,
            reply_to_message_id="",
            group_id=message.metadata.group_id,
            created_at=time(),
            ttl=DEFAULT_TTL,
            message_type=message.metadata.message_type,
        )

    def _wait(self, message_id: str, timeout: float | None = None) -> Message:
        sent, future = self._futures.pop(message_id)
        try:
            return from_text(memoryview(future.result(timeout)))
        except (WorkerDied, TimeoutError) as error:
            return Message(Error(code=_WORKER_DIED, reason=str(error)), reply_to=sent)


def _message(content: RecordDict, address: Metadata) -> Message:
    # Flower's typed constructors make an address themselves; a grid has to give its own.
    return Message(content=content, metadata=address)  # type: ignore[call-overload,no-any-return]
