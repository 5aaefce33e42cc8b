"""client.toml: what would otherwise be said with every medfl-client command.

The environment (MEDFL_STATE, MEDFL_SITE) is stronger than the file, and flags are stronger still.
"""

from __future__ import annotations

from pathlib import Path

from medfl.common import config
from medfl.common.written import Positive, written


@written
class ClientSettings:
    """state, site: paths; relative ones start at the file's folder. days: of an approval.

    proxy: http://host:port of the hospital's HTTP proxy, if the coordinator is reached through one.
        `grpc_proxy`, `https_proxy` and `http_proxy` of the environment are stronger. A password
        belongs into the environment.
    """

    state: Path | None = None
    site: Path | None = None
    days: Positive | None = None
    proxy: str | None = None

    def faults(self) -> list[str]:
        """Contradictions between keys, one line each."""
        if self.proxy is None or self.proxy.startswith("http://"):
            return []
        return ["proxy: write http://host:port; the way to the proxy itself has no TLS in gRPC"]


def load_client_settings(path: Path) -> ClientSettings:
    """Read client.toml. Raises ConfigError."""
    return config.load(path, ClientSettings)
