"""Flower's SuperLink as a child process: `python -m medfl.server.superlink`, started by the engine.

Flower's own command leaves the control and fleet calls open to everybody on the machine. Here all
calls need the key that only the engine and the gateway know, and the port is the engine's own
socket, so that it stays the same, and callers wait, while a SuperLink is replaced.
"""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

from medfl.common.allocator import give_back
from medfl.common.child import end_with_parent, first_line
from medfl.common.tunnel import KEY_HEADER

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The coordinator names all messages of a round in one call; objects are 5 MiB.
_MAX_BODY = 64 * 1024 * 1024
# How long a call waits for the database's lock; the gate waits 60 s for the call.
_BUSY_MS = "45000"


def guarded(app: App, key: str) -> App:
    """The app, for callers who know the key; others get 401 before anything of theirs is read.

    A body is handed on in one piece: Flower passes each piece through eight layers.
    """
    wanted = key.encode()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(KEY_HEADER.encode(), b"")
        if not hmac.compare_digest(given, wanted):
            await _refuse(send, 401)
            return
        body = await _whole(receive)
        if body is None:
            await _refuse(send, 413)
            return
        pending = [body]

        async def whole() -> Scope:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        await app(scope, whole, send)

    return guard


async def _whole(receive: Receive) -> bytes | None:
    """The request's body; None where it is larger than any call's."""
    pieces, size = [], 0
    while True:
        message = await receive()
        piece = message.get("body", b"")
        size += len(piece)
        if size > _MAX_BODY:
            return None
        pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def serve(listener: socket.socket, database: Path, key: str) -> None:
    """Serve until told to stop (SIGTERM)."""
    import uvicorn
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import SQLITE_PRAGMAS
    from flwr.supercore.object_store import object_store_factory
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    from medfl.server.objects import FileObjectStore

    # Flower chooses the store by the database's name alone.
    store = partial(FileObjectStore, folder=database.with_name("objects"))
    vars(object_store_factory)["SqlObjectStore"] = store
    # After Flower's 5 s a pull can fail when it has already claimed the message for the hospital,
    # which then never sees it.
    pragmas = dict(SQLITE_PRAGMAS) | {"busy_timeout": _BUSY_MS}
    vars(sql_mixin)["SQLITE_PRAGMAS"] = tuple(pragmas.items())
    host, port = listener.getsockname()[:2]
    config = SuperLinkLifespanConfig(
        control_address=f"{host}:{port}",
        health_server_address=None,
        host=host,
        port=port,
        insecure=True,  # loopback; what leaves the machine goes through the gateway
        certificates=None,
        superexec_auth_secret=key.encode(),
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=False,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        # No SuperExec is started: the engine takes the run itself.
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    app = guarded(create_app(config, SuperLinkLifespan), key)
    settings = uvicorn.Config(
        app=app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(settings).run(sockets=[listener])


def main() -> int:
    """The child: socket and key come from the engine, as inherited descriptor and first line."""
    give_back()
    key = first_line()
    end_with_parent()
    listener = socket.socket(fileno=int(os.environ["MEDFL_LISTENER"]))
    serve(listener, Path(os.environ["MEDFL_DATABASE"]), key)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
