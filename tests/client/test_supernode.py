"""The SuperNode's loop, by Flower's own functions and state."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from medfl.client.supernode import LastQuestion

STORE: Any = SimpleNamespace(get_object_tree=lambda _: None, delete=lambda _: None)


def message(name: str, answers: str = "") -> Any:
    """With as much of Flower's message as its state and loop look at."""
    metadata = {"message_id": name, "reply_to_message_id": answers, "message_type": "train"}
    return SimpleNamespace(metadata=SimpleNamespace(run_id=7, group_id="", **metadata))


def test_an_answer_to_a_run_that_ended_is_not_taken_for_the_next_ones() -> None:
    """Flower alone sends the old answer and pulls again: the new one would wait for round 3."""
    state = InMemoryNodeState(STORE)
    old, new = message("round 1"), message("round 2")
    for asked in (old, new):
        state.store_message(asked)
    state.get_messages_legacy(is_reply=False)  # both were taken by the training process
    state.store_message(message("answer 1", answers="round 1"))
    sent = []

    def send(reply: Any, *_: Any) -> tuple[set[str], str]:
        sent.append(reply.metadata.message_id)
        return set(), "session"

    loop = SimpleNamespace(
        _pull_and_store_message=lambda receive, **_: receive() and 7,
        _push_messages=start_client_internal._push_messages,
    )
    last = LastQuestion(loop)
    assert last.pull(receive=lambda: (new, None)) == 7
    late = threading.Timer(0.3, state.store_message, [message("answer 2", answers="round 2")])
    late.start()
    last.push(state=state, object_store=STORE, send=send, push_object=lambda *_: None)
    assert sent == ["answer 1", "answer 2"]
    late.join()
