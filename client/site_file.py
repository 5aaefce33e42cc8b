"""The site.toml of a running client: says when it has changed, and what that stops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medfl.client.consent import Refusal, allowed
from medfl.client.premises import Home
from medfl.common.errors import ConfigError, MedflError
from medfl.common.private_files import refuse_writable
from medfl.common.site import Site, load_site


@dataclass(slots=True)
class SiteFile:
    """file: site.toml. The training process reads it again at every question and goes by what it
    says then; this is for the person who has changed it."""

    home: Home
    file: Path
    _was: bytes | None = None

    def news(self) -> list[str]:
        """What is to be said since the last call: nothing, where the file is as it was.

        The first call names the studies that were approved under another site.toml.
        """
        text, first = self._text(), self._was is None
        if text == self._was:
            return []
        self._was = text
        try:
            stale = stale_studies(self.home, self.read())
        except MedflError as error:
            self.home.record("site.toml cannot be read")
            return [f"Nothing runs until {self.file} can be read: {error}"]
        if not first:
            self.home.record("site.toml changed", stopped=", ".join(stale)[:300])
        said = f"{self.file} " + ("is another than was approved" if first else "has changed")
        if stale:
            again = " and ".join(f"medfl-client approve {name}" for name in stale)
            return [
                f"{said}. Nothing runs for {', '.join(stale)} until it is approved again: {again}"
            ]
        return [] if first else [f"{said}; it holds from the next question on."]

    def read(self) -> Site:
        """As it is now. Raises ConfigError."""
        refuse_writable(self.file)
        return load_site(self.file)

    def _text(self) -> bytes:
        try:
            return self.file.read_bytes()
        except OSError:
            return b""


def stale_studies(home: Home, site: Site) -> list[str]:
    """Names of studies whose approval holds but for the site.toml that it was signed under."""
    stale = []
    for published in home.published():
        try:
            holds = not isinstance(allowed(home, published.digest, None), Refusal)
        except ConfigError:
            continue
        if holds and isinstance(allowed(home, published.digest, None, site), Refusal):
            stale.append(published.name)
    return stale
