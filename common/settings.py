"""Settings from three places, the later ones stronger: a file, the environment, flags."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from medfl.common import config
from medfl.common.config import Checked
from medfl.common.errors import ConfigError

T = TypeVar("T", bound=Checked)


def layered(
    kind: type[T],
    file: Path | None,
    prefix: str,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
) -> T:
    """The settings `kind`, each key from the strongest place that has it.

    prefix: MEDFL_SERVER_ makes MEDFL_SERVER_LISTEN the key `listen`; other names that begin so
        are refused, because a misspelt setting must not be passed over. flags: None = not given.

    Raises:
        ConfigError: an unknown key or a wrong value, naming the place.
    """
    merged: dict[str, Any] = {}
    if file is not None and file.exists():
        merged |= _read(file)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    faults = []
    for name, text in environment.items():
        if name.startswith(prefix):
            key = name.removeprefix(prefix).lower()
            if key in known:
                merged[key] = _value(text, str(known[key].type))
            else:
                faults.append(f"{name}: is no setting; known: {', '.join(sorted(known))}")
    if faults:
        raise ConfigError(faults)
    merged |= {key: value for key, value in flags.items() if value is not None}
    source = str(file) if file is not None else "settings"
    return config.parse(merged, kind, source)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as TOML: {error}") from None


def _value(text: str, annotation: str) -> Any:
    """Text of the environment as what the file would hold: numbers and lists are JSON."""
    if annotation.startswith(("str", "Name", "Path")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
