"""The hospital as a Flower ClientApp: the only file of this side that knows Flower."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from medfl.client.hospital import Hospital, answer
from medfl.common.errors import CaseError, MedflError
from medfl.common.flower_records import from_record, to_record
from medfl.common.messages import pack, refusal, unpack_instruction

log = logging.getLogger(__name__)

FindHospital = Callable[[Context], Hospital]


def client_app(find_hospital: FindHospital) -> ClientApp:
    """A ClientApp that answers for the hospital which `find_hospital` knows the context by.

    Flower's message types are query.prepare, train.round and evaluate.finish; all take the same
    way, because the instruction itself says what is asked.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        site, round_ = "", 0
        # Flower sends the text of what escapes from here to the coordinator, so nothing does.
        try:
            hospital = find_hospital(context)
            site = hospital.name
            asked = unpack_instruction(from_record(message.content))
            round_ = asked.round
            content = to_record(pack(answer(hospital, asked)))
        except Exception as error:  # noqa: BLE001
            log.error("round=%d site=%s refuses: %s", round_, site, _told(error))
            content = to_record(pack(refusal(site, error, round_)))
        return Message(content, reply_to=message)

    app.query("prepare")(handle)
    app.train("round")(handle)
    app.evaluate("finish")(handle)
    return app


def _told(error: Exception) -> str:
    """For the hospital's own log: the texts that we wrote for it, and of others only the place."""
    if isinstance(error, MedflError) and not isinstance(error, CaseError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
