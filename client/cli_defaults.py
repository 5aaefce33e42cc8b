"""client.toml as click's defaults; what reads it is loaded only where there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

PLACES = ("~/.config/medfl/client.toml", "/etc/medfl/client.toml")
VARIABLE = "MEDFL_CLIENT_TOML"


def defaults(command: click.Command) -> dict[str, Any]:
    """The file's settings as click's defaults for `command` and all below it.

    Raises:
        ConfigError: the file has an unknown key or a wrong value, or the one named is missing.
    """
    found = _file()
    if found is None:
        return {}
    # Imported here, so that --help stays fast.
    from medfl.client.settings import load_client_settings

    said = load_client_settings(found)
    if said.proxy is not None and not {"https_proxy", "http_proxy"} & set(os.environ):
        os.environ.setdefault("grpc_proxy", said.proxy)
    values: dict[str, Any] = {"days": said.days}
    for key, path in (("state", said.state), ("site", said.site)):
        values[key] = None if path is None else str(found.parent / path.expanduser())
    return _for(command, {key: value for key, value in values.items() if value is not None})


def _file() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    # os.path, because Path.exists raises where HOME is another user's, as it is after `setpriv`.
    places = (os.path.expanduser(place) for place in PLACES)
    return next((Path(p) for p in places if os.path.exists(p)), None)


def _for(command: click.Command, values: dict[str, Any]) -> dict[str, Any]:
    """The values for a command's options, and so on for the commands below it."""
    below: dict[str, click.Command] = getattr(command, "commands", {})
    # Where the site's file must be said (exclude, lineage), a default would shift the arguments.
    open_ = {p.name for p in command.params if not p.required}
    own = {key: value for key, value in values.items() if key in open_}
    return own | {name: _for(inner, values) for name, inner in below.items()}
