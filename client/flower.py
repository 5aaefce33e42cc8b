"""The hospital as a Flower ClientApp: the only file of this side that knows Flower."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from medfl.client.hospital import Hospital, answer
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
        hospital = find_hospital(context)
        asked = unpack_instruction(from_record(message.content))
        try:
            reply = answer(hospital, asked)
        except Exception as error:
            log.exception("round=%d could not be answered", asked.round)
            reply = refusal(hospital.name, error, asked.round)
        return Message(to_record(pack(reply)), reply_to=message)

    app.query("prepare")(handle)
    app.train("round")(handle)
    app.evaluate("finish")(handle)
    return app
