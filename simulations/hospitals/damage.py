"""What happens to files on their way through a hospital."""

from __future__ import annotations

from pathlib import Path

NOTE = "Bilder auf CD an den Hausarzt gegeben.\nImages were handed out on a CD.\n"


def truncate(path: Path) -> None:
    """Keep the header and part of the pixels, as after a broken transfer."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.7)])


def write_text(path: Path) -> None:
    """A note that somebody saved under a DICOM name."""
    path.write_text(NOTE, encoding="utf-8", newline="\n")
