"""client.toml: what would otherwise be said with every medfl-client command.

The environment (MEDFL_STATE, MEDFL_SITE) is stronger than the file, and flags are stronger still.
"""

from __future__ import annotations

from pathlib import Path

from medfl.common import config
from medfl.common.written import Positive, written


@written
class ClientSettings:
    """state, site: paths; relative ones start at the file's folder. days: of an approval."""

    state: Path | None = None
    site: Path | None = None
    days: Positive | None = None

    def faults(self) -> list[str]:
        """Nothing contradicts."""
        return []


def load_client_settings(path: Path) -> ClientSettings:
    """Read client.toml. Raises ConfigError."""
    return config.load(path, ClientSettings)
