"""Telling systemd how a service is: sd_notify(3), which is one datagram, without its library."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def tell(*states: str) -> bool:
    """Send lines such as READY=1 or STATUS=...; False where nobody listens.

    A service manager that is gone is no reason to stop.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address[0] == "@":
        # Linux's abstract names begin with a zero byte.
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
            end.sendto("\n".join(states).encode(), address)
    except OSError as error:
        log.debug("systemd was not told: %s", error.strerror)
        return False
    return True
