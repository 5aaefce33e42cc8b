"""server.toml, MEDFL_SERVER_… and flags: how this coordinator runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from medfl.common.errors import ConfigError
from medfl.common.private_files import refuse_writable
from medfl.common.settings import layered
from medfl.common.written import Count, Positive, written
from medfl.server.federation import Federation

PREFIX = "MEDFL_SERVER_"


@written
class ServerSettings:
    """What a person may set.

    name: of the federation, for people. listen: address and port of the gateway, the only one that
        faces outwards. address: host:port under which the hospitals reach it (through proxies and
        port forwarding), for the text of an invitation. certificate_days: life of a site's
        certificate. invitation_hours: life of a token. workers: calls that the gateway answers at a
        time; a hospital that waits for work holds one and needs one more, so two a hospital. They
        are threads that begin when they are needed. connections: from all addresses together, if
        the machine allows so many descriptors; one address has a quarter, so write more where many
        hospitals come through one proxy. connect_wait_s: so long a run waits, once enough hospitals
        are there, for the others that have approved; who comes later joins at the next round.
    """

    name: str
    listen: str = "0.0.0.0:8443"
    address: str = ""
    certificate_days: Positive = 90.0
    invitation_hours: Positive = 24.0
    workers: Count = 512
    connections: Count = 4096
    connect_wait_s: Positive = 60.0

    def faults(self) -> list[str]:
        """Contradictions between keys, one line each."""
        faults = []
        if not self.name.strip() or len(self.name) > 200:
            faults.append("name: write a short name that people know the federation by")
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            faults.append('listen: write address and port, like "0.0.0.0:8443"')
        return faults


def load_settings(folder: Path, flags: Mapping[str, Any] | None = None) -> ServerSettings:
    """The settings of a federation's folder. Raises ConfigError where it is none."""
    file = folder / "server.toml"
    if not file.exists():
        raise ConfigError(
            f"{folder.absolute()}: is no federation's folder. Make one with: medfl-server init "
            'FOLDER --name "..."; or name it with --folder or MEDFL_SERVER_FOLDER'
        )
    refuse_writable(file)
    environment = {k: v for k, v in os.environ.items() if k != f"{PREFIX}FOLDER"}
    return layered(ServerSettings, file, PREFIX, environment, flags or {})


def open_federation(folder: Path, clock: Callable[[], float] = time.time) -> Federation:
    """The federation in `folder`. Raises ConfigError where there is none."""
    return Federation(folder, load_settings(folder).name, clock)


def settings_text(settings: ServerSettings) -> str:
    """As server.toml."""
    lines = [
        "# Settings of this federation's coordinator. The environment (MEDFL_SERVER_LISTEN and"
    ]
    lines += ["# so on) and the command's flags are stronger than this file."]
    for f in fields(settings):
        # A JSON string or number is a TOML one.
        lines.append(f"{f.name} = {json.dumps(getattr(settings, f.name), ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
