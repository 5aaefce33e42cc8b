"""A study as it travels and as it is signed: plain JSON from which the same digest follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from medfl.common import config
from medfl.common.coordination import Published
from medfl.common.errors import ConfigError, PolicyRefused
from medfl.common.signing import SigningKey, canonical, is_signed, sign
from medfl.common.study import Study

_PURPOSE = "published study"


def to_text(study: Study) -> str:
    """Canonical JSON of everything that the study says.

    Raises:
        ConfigError: the study starts from weights, which cannot be published yet.
    """
    if study.model.start_weights is not None:
        raise ConfigError(
            "model.start_weights: weights to start from cannot be published yet; leave the key "
            "and its SHA-256 out"
        )
    plain: dict[str, Any] = json.loads(json.dumps(asdict(study), default=str))
    return canonical(plain).decode()


def from_text(text: str) -> Study:
    """Inverse of `to_text`; checked like a file that a person wrote. Raises ConfigError."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        raise ConfigError("The published study is not a JSON object.")
    return config.parse(plain, Study, "published study")


def refuse_control(study: Study) -> None:
    """Raises ConfigError where a text has a line break or a code for terminals: in the words that a
    hospital reads before it signs, such a text could write a line that medfl did not."""
    faults = [
        f"{key}: has a line break or a control character; write it in one line of plain text"
        for key, value in settings(study).items()
        if isinstance(value, str) and not value.isprintable()
    ]
    if faults:
        raise ConfigError(faults)


def settings(study: Study) -> dict[str, Any]:
    """All that the study says, by dotted key; what it leaves open is not there."""
    return dict(_flat("", json.loads(to_text(study))))


def changes(before: Study, after: Study) -> list[str]:
    """What another study of the same name says otherwise, one line a key."""
    old, new = settings(before), settings(after)
    lines = []
    for key in sorted({*old, *new}):
        if key not in new:
            lines.append(f"{key} = {old[key]!r} is no longer there")
        elif key not in old:
            lines.append(f"{key} = {new[key]!r} is new")
        elif old[key] != new[key]:
            lines.append(f"{key}: {old[key]!r} becomes {new[key]!r}")
    return lines


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _flat(f"{key}.{name}" if key else name, each)
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for number, each in enumerate(value):
            yield from _flat(f"{key}.{number}", each)
    elif isinstance(value, list):
        yield key, ", ".join(str(each) for each in value)
    elif value is not None:
        yield key, value


def publish(key: SigningKey, study: Study, at: float) -> Published:
    """The study with the coordinator's signature."""
    bare = Published(name=study.name, digest=study.digest, study=to_text(study), at=int(at))
    return Published(**{**asdict(bare), "signature": sign(key, _PURPOSE, _signed_part(bare))})


def opened(coordinator: str, published: Published) -> Study:
    """The study, if the coordinator's pinned key (hex) signed it and its digest is right.

    Raises:
        PolicyRefused: it was changed on the way, or signed by somebody else.
        ConfigError: this version of medfl does not understand it.
    """
    if not is_signed(coordinator, _PURPOSE, _signed_part(published), published.signature):
        raise PolicyRefused(
            f"The study {published.name} is not signed by the coordinator's key that was pinned "
            "at enrolment. Do not approve it; speak to the coordinator."
        )
    study = from_text(published.study)
    if study.digest != published.digest or study.name != published.name:
        raise PolicyRefused(
            f"The study {published.name} does not have the digest that it names. Coordinator and "
            "hospitals must run the same version of medfl; compare `--version` on both."
        )
    return study


def _signed_part(published: Published) -> dict[str, Any]:
    return {key: value for key, value in asdict(published).items() if key != "signature"}
