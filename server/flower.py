"""The hospitals as Flower's Grid reaches them: the only file of this side that knows Flower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from medfl.common.errors import FederationError
from medfl.common.flower_records import from_record, to_record
from medfl.common.messages import Instruction, Reply, pack, unpack_reply

_TYPES = {"prepare": "query.prepare", "round": "train.round", "finish": "evaluate.finish"}


class FlowerSites:
    """`medfl.server.roster.Sites` over a Grid; an address is a node id as text."""

    def __init__(self, grid: Grid, deadline_s: float | None = None) -> None:
        self._grid = grid
        self._deadline_s = deadline_s

    def names(self) -> list[str]:
        """Node ids, ascending."""
        return [str(n) for n in sorted(self._grid.get_node_ids())]

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        """One reply an instruction, in order; a node that failed or stayed silent is a refusal."""
        waiting: list[tuple[str, int]] = []

        def messages() -> Iterator[Message]:
            for address, asked in instructions:
                waiting.append((address, asked.round))
                yield Message(
                    content=to_record(pack(asked)),
                    dst_node_id=int(address),
                    message_type=_TYPES[asked.kind],
                    group_id=str(asked.round),
                )

        early: dict[str, Reply] = {}
        done = 0
        for message in self._grid.send_and_receive(messages(), timeout=self._deadline_s):
            early[str(message.metadata.src_node_id)] = _reply(message)
            while done < len(waiting) and waiting[done][0] in early:
                yield early.pop(waiting[done][0])
                done += 1
        for address, round_ in waiting[done:]:
            yield early.pop(address, Reply(site=address, round=round_, refusal="no answer"))


def server_app(main: Callable[[FlowerSites, Context], None]) -> ServerApp:
    """A ServerApp that runs `main` with the sites of the grid."""
    app = ServerApp()

    @app.main()
    def _main(grid: Grid, context: Context) -> None:
        main(FlowerSites(grid), context)

    return app


def _reply(message: Message) -> Reply:
    """The site's reply; one that did not come or cannot be read names the node only."""
    node = str(message.metadata.src_node_id)
    if message.has_error():
        return Reply(site=node, refusal="node failed")
    try:
        return unpack_reply(from_record(message.content))
    except FederationError:
        return Reply(site=node, refusal="damaged answer")
