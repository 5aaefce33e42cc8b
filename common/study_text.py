"""A study as it travels and as it is signed: plain JSON from which the same digest follows."""

from __future__ import annotations

import json
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
