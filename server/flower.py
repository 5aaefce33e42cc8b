"""The hospitals as Flower reaches them: over any Grid, or over the engine's own run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from medfl.common.errors import FederationError, NotAdmitted
from medfl.common.flower_objects import Malformed, fixed
from medfl.common.flower_records import from_record, to_record
from medfl.common.messages import Instruction, Reply, pack, unpack_reply
from medfl.common.recent import Recent
from medfl.server.patience import AWAY_S, Patience

if TYPE_CHECKING:
    from medfl.server.admit import Door
    from medfl.server.link import Run
    from medfl.server.register import Roster

log = logging.getLogger(__name__)

_TYPES = {
    "prepare": "query.prepare",
    "keys": "query.keys",
    "shares": "query.shares",
    "round": "train.round",
    "unmask": "query.unmask",
    "finish": "evaluate.finish",
}


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
            packed = Recent[Instruction, RecordDict](lambda asked: to_record(pack(asked)))
            for address, asked in instructions:
                waiting.append((address, asked.round))
                yield Message(
                    content=packed(asked),
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


class ConnectedSites:
    """`medfl.server.rounds.Sites` over a run of the engine; an address is a hospital's name.

    deadline_s: the longest for the answers to one question, counted from when it was asked; what
        sites took before shortens it (`Patience`). Who has not answered by then is a refusal. A
        hospital that came back without what it was given, because its machine restarted, is asked
        again, and so is one whose question went down with the SuperLink. only: who may take part
        now; None = who is connected.
    door: checks each answer's seal and approval. check: called while waiting; it may raise.
    """

    def __init__(
        self,
        run: Run,
        roster: Roster,
        *,
        deadline_s: float = 3600.0,
        only: Callable[[], Collection[str]] | None = None,
        door: Door | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._roster = run, roster
        self._only, self._door, self._check = only, door, check
        self._patience = Patience(deadline_s)

    def names(self) -> list[str]:
        """Who is connected and may take part, ascending."""
        may = None if self._only is None else self._only()
        return [s for s in self._roster.sites() if may is None or s in may]

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        """One reply an instruction, in order; at most one waits in memory."""
        packed = Recent[Instruction, RecordDict](lambda asked: fixed(to_record(pack(asked))))
        sent = [(site, one, self._send(site, one, packed(one))) for site, one in instructions]
        del packed
        began = time.monotonic()
        for site, asked, message_id in sent:
            yield self._timed(site, asked, message_id, began)

    def _timed(self, site: str, asked: Instruction, message_id: str | None, began: float) -> Reply:
        """The reply within the time that this site has."""
        patience, kind = self._patience, asked.kind
        reply = self._reply(site, asked, message_id, began)
        waited = time.monotonic() - began
        if reply.refusal in _UNANSWERED:
            patience.missed(site, kind)
            return replace(reply, answered=waited)
        if not reply.refusal:
            # Never less than it took: an earlier site may have been waited for meanwhile.
            patience.answered(site, kind, waited)
        return replace(reply, answered=min(waited, self._roster.answered_s(site, began) or waited))

    def _send(self, site: str, asked: Instruction, record: RecordDict) -> str | None:
        """The id to ask for the reply with; None where the site is not there."""
        node_id = self._roster.node_of(site)
        if node_id is None:
            return None
        message_id = self._run.send(node_id, record, _TYPES[asked.kind], str(asked.round))
        self._roster.post(site, message_id)
        return message_id

    def _reply(self, site: str, asked: Instruction, message_id: str | None, began: float) -> Reply:
        end = began + self._patience.allows_s(site, asked.kind)
        while True:
            self._check()
            version = self._roster.version
            if message_id is None:
                message_id = self._send(site, asked, to_record(pack(asked)))
            elif self._roster.was_lost(message_id):
                log.warning("round=%d site=%s lost the question; asked again", asked.round, site)
                message_id = None
                continue
            else:
                try:
                    never = partial(self._never_whole, site, message_id, end)
                    got = self._received(site, message_id, asked, never)
                except Malformed as error:
                    log.warning("round=%d site=%s: %s", asked.round, site, error)
                    return Reply(site=site, round=asked.round, refusal="malformed answer")
                if isinstance(got, RecordDict):
                    return self._checked(site, asked, got)
                if got is _GONE:
                    log.warning("round=%d site=%s: no whole answer; asked again", asked.round, site)
                    message_id = None
            if self._is_given_up(site) or time.monotonic() >= end:
                why = _AWAY if self._roster.away_s(site) else _LATE
                return Reply(site=site, round=asked.round, refusal=why)
            # The bell tells when an answer has come; looking by ourselves is for safety.
            self._roster.wait(version, min(_LOOK_S, max(0.01, end - time.monotonic())))

    def _is_given_up(self, site: str) -> bool:
        return self._roster.away_s(site) >= AWAY_S and not self._roster.at_work()

    def _never_whole(self, site: str, message_id: str, end: float) -> bool:
        """Whether an answer that was announced need not be waited for."""
        return (
            self._roster.was_broken(message_id)
            or self._roster.quiet_s(site) > _QUIET_S
            or self._is_given_up(site)
            or time.monotonic() >= end
        )

    def _received(
        self, site: str, message_id: str, asked: Instruction, never: Callable[[], bool]
    ) -> RecordDict | object | None:
        # The engine's, with a database: half a second that a simulation does not need.
        from medfl.server.link import UploadBroken

        sent = sum(a.nbytes for group in (asked.weights, asked.control) for a in group.values())
        try:
            got = self._run.receive(message_id, 2 * sent + _MAX_REST, never)
        except UploadBroken as error:
            log.info("%s: %s", site, error)
            return _GONE
        if isinstance(got, Error):
            log.info("%s: Flower's error %d", site, got.code)
            return _GONE
        return got

    def _checked(self, site: str, asked: Instruction, record: RecordDict) -> Reply:
        """The reply, if the hospital speaks for itself and about what it was asked."""
        try:
            envelope = from_record(record)
            if self._door is None:
                reply = unpack_reply(envelope)
            else:
                reply = self._door.opened(site, asked, envelope)
        except FederationError:
            return Reply(site=site, round=asked.round, refusal="malformed answer")
        except NotAdmitted as error:
            log.warning("round=%d an answer was refused: %s", asked.round, error)
            return Reply(site=site, round=asked.round, refusal=error.phrase)
        if reply.site != site:
            log.warning("round=%d site=%s answered in another name", asked.round, site)
            return Reply(site=site, round=asked.round, refusal="answered in another name")
        if reply.round != asked.round and not reply.refusal:
            return Reply(site=site, round=asked.round, refusal="answered about another round")
        return reply


_AWAY, _LATE = "not connected", "late"
_UNANSWERED = (_AWAY, _LATE)
# Flower gave a message up: it is to be sent again once the site is there.
_GONE = object()
_LOOK_S = 0.5
# An upload of which nothing comes for this long is asked for again: one object of 5 MiB may take
# as long on a line of 50 kbit/s.
_QUIET_S = 900.0
# What an answer may hold beside a delta and a control variate: statistics, metrics, framing.
_MAX_REST = 64 * 1024 * 1024


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
