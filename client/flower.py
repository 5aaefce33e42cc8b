"""The hospital as a Flower ClientApp. How tasks come to it is `medfl.client.tasks`: apart, so that
a simulation does not import Flower's network for nothing."""

from __future__ import annotations

import logging
import traceback
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from medfl.client.hospital import Hospital, answer
from medfl.common.errors import CaseError, MedflError
from medfl.common.flower_records import from_record, to_record
from medfl.common.messages import (
    Envelope,
    Instruction,
    pack,
    refusal,
    unpack_instruction,
)

log = logging.getLogger(__name__)

FindHospital = Callable[[Context], Hospital]


def client_app(find_hospital: FindHospital) -> ClientApp:
    """A ClientApp that answers for the hospital which `find_hospital` knows the context by.

    Flower's message types are query.prepare, train.round, evaluate.finish, and query.keys, .shares
    and .unmask of a secure sum; all take the same way, because the instruction itself says what is
    asked. Where `find_hospital` has a `seal` (`medfl.client.approved`), each answer gets one, and
    where it has `note_refusal`, it hears what was refused and why.
    """
    app, read = ClientApp(), _Reader()
    seal = getattr(find_hospital, "seal", None)
    note = getattr(find_hospital, "note_refusal", None)

    def handle(message: Message, context: Context) -> Message:
        site, round_ = str(getattr(find_hospital, "name", "")), 0
        sealed: Callable[[Envelope], Envelope] = _as_it_is
        noted: Callable[[str], None] = _not_noted
        # Flower sends the text of what escapes from here to the coordinator, so nothing does.
        try:
            received, asked = read(message.content)
            round_ = asked.round
            if seal is not None:
                sealed = partial(seal, received.about, asked)
            if note is not None:
                noted = partial(note, asked)
            hospital = find_hospital(_of_run(context, asked.run))
            site = hospital.name
            content = to_record(sealed(pack(answer(hospital, asked))))
        except Exception as error:  # noqa: BLE001
            log.error("round=%d site=%s refuses: %s", round_, site, _told(error))
            _note_anyway(noted, _told(error))
            content = to_record(_told_anyway(sealed, pack(refusal(site, error, round_))))
        return Message(content, reply_to=message)

    for step in ("prepare", "keys", "shares", "unmask"):
        app.query(step)(handle)
    app.train("round")(handle)
    app.evaluate("finish")(handle)
    return app


class _Reader:
    """Reads a record once for all who get it, and keeps what it says no longer than the record: a
    simulation's sites are asked in one record."""

    def __init__(self) -> None:
        self._of: weakref.ref[RecordDict] | None = None
        self._said: tuple[Envelope, Instruction] | None = None

    def __call__(self, record: RecordDict) -> tuple[Envelope, Instruction]:
        if self._said is None or self._of is None or self._of() is not record:
            received = from_record(record)
            self._said = received, unpack_instruction(received)
            self._of = weakref.ref(record, self._forget)
        return self._said

    def _forget(self, of: weakref.ref[RecordDict]) -> None:
        if of is self._of:
            self._said = None


def _of_run(context: Context, run: str) -> Context:
    """The context with the run's name; Flower's own engine wants its contexts back unchanged."""
    about = {**context.run_config, "run": run}
    return Context(context.run_id, context.node_id, context.node_config, context.state, about)


def _told_anyway(sealed: Callable[[Envelope], Envelope], refused: Envelope) -> Envelope:
    """A refusal, sealed if that can be done: a full disk keeps the seal's own line from the log."""
    try:
        return sealed(refused)
    except MedflError as error:
        log.error("a refusal goes without its seal: %s", _told(error))
        return refused


def _note_anyway(noted: Callable[[str], None], why: str) -> None:
    """The coordinator gets its refusal also where a full disk keeps it from the log."""
    try:
        noted(why)
    except MedflError as error:
        log.error("a refusal is not in the audit log: %s", _told(error))


def _not_noted(why: str) -> None:
    pass


def _as_it_is(envelope: Envelope) -> Envelope:
    return envelope


def _told(error: Exception) -> str:
    """For the hospital's own log: the texts that we wrote for it, and of others only the place."""
    if isinstance(error, MedflError) and not isinstance(error, CaseError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
