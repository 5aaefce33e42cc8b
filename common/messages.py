"""What coordinator and hospital say to each other, apart from how it travels.

An `Instruction` asks, a `Reply` answers; both become an `Envelope` (one JSON text and named groups
of arrays), which is all that a transport has to carry. Decoding refuses what it does not know.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter

from medfl.common.errors import (
    BudgetSpent,
    ConfigError,
    DataError,
    FederationError,
    NotApproved,
    NotFinite,
    OtherCode,
    PolicyRefused,
    StorageError,
    TrainerDied,
)
from medfl.common.tensors import Tensors

log = logging.getLogger(__name__)

# For the decoder: arrays are passed as they are, numbers must be finite, nothing else may be there.
_STRICT = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, extra="forbid")

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
Metrics = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Envelope:
    """about: JSON object. arrays: groups of named arrays, such as weights or delta."""

    about: str
    arrays: Mapping[str, Tensors] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the coordinator asks of one hospital.

    kind: prepare = send statistics; round = evaluate the weights on the validation part, then
        train; finish = evaluate the weights on `parts` and keep the results on the hospital's disk.
        keys, shares, unmask = the steps of a secure sum around a round (`medfl.common.secure`).
    study_digest: the study this belongs to; a hospital answers for no other.
    run: a name that separates several runs of one study, such as a comparison's baselines.
    round, best_round: 1-based; best_round is the best so far (0 = none), for layers kept at home.
    attempt: grows each time the coordinator takes the run up again after it was interrupted.
    model: digest of `weights`, "" in prepare.
    seed: of the run; each hospital derives its own streams from it.
    shared: plain form of `medfl.common.statistics.Shared`; empty in prepare.
    secure: plain form of what a step of a secure sum says.
    weights: the global model. control: the coordinator's control variate (SCAFFOLD).
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    kind: Literal["prepare", "keys", "shares", "round", "unmask", "finish"]
    study_digest: str
    run: str
    round: int = 0
    best_round: int = 0
    attempt: int = 0
    model: str = ""
    seed: int = 0
    shared: Mapping[str, Any] = field(default_factory=dict)
    secure: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    weights: Tensors = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """What one hospital answers.

    n_cases: imaging studies or records trained on. metrics: by part, already rounded by the
        hospital's policy. loss: mean training loss, rounded likewise; None under differential
        privacy and under masks.
    epsilon: privacy spent so far by this study's training, None without it.
    counts: cases by part. left_out: cases left out, by reason. statistics: plain form of
        `LocalStatistics`, in prepare only. refusal: why the hospital takes no part, "" else.
    secure: plain form of what a step of a secure sum answers.
    evaluates: in prepare: this hospital only evaluates, and is asked nothing but `finish`.
    answered: what the coordinator writes beside it: seconds from its question to the whole answer.
    delta: local minus global weights. control: change of the site's control variate (SCAFFOLD).
        Both may travel packed (`medfl.common.packing`), or masked together as one array of `delta`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    site: str
    round: int = 0
    n_cases: int = 0
    steps: int = 0
    seconds: float = 0.0
    loss: float | None = None
    epsilon: float | None = None
    target_delta: float | None = None
    metrics: Mapping[Part, Metrics] = field(default_factory=dict)
    counts: Mapping[Part, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    cohort: str = ""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""
    secure: Mapping[str, Any] = field(default_factory=dict)
    evaluates: bool = False
    answered: float | None = None
    delta: Tensors = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)


M = TypeVar("M", Instruction, Reply)

_ARRAYS: dict[type, tuple[str, ...]] = {
    Instruction: ("weights", "control"),
    Reply: ("delta", "control"),
}

_DECODERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in _ARRAYS}

# All that a coordinator learns of an error at a hospital. The first class that fits counts.
_REFUSALS: dict[type[Exception], str] = {
    OtherCode: "code came with the study",
    TrainerDied: "training process ended",
    NotFinite: "value that is not finite",
    NotApproved: "no approval that holds at the hospital",
    PolicyRefused: "not allowed by the hospital's policy",
    BudgetSpent: "privacy budget spent",
    DataError: "data cannot serve the study",
    ConfigError: "study cannot be run there",
    FederationError: "message could not be used",
    StorageError: "disk full or damaged file",
    MemoryError: "out of memory",
}
# Classes of torch, which is not imported for their sake.
_BY_NAME = {"OutOfMemoryError": "out of memory", "AcceleratorError": "GPU failed"}
UNEXPECTED = "unexpected error"


def pack(message: Instruction | Reply) -> Envelope:
    """As an envelope; the arrays are not copied. Raises ValueError for numbers that are none."""
    groups = {name: getattr(message, name) for name in _ARRAYS[type(message)]}
    emptied = {f.name: getattr(message, f.name) for f in fields(message) if f.name not in groups}
    return Envelope(json.dumps(emptied, sort_keys=True, allow_nan=False), groups)


def unpack_instruction(envelope: Envelope) -> Instruction:
    """Inverse of `pack`. Raises FederationError for anything unknown or of another type."""
    return _unpack(envelope, Instruction)


def unpack_reply(envelope: Envelope) -> Reply:
    """Inverse of `pack`. Raises FederationError for anything unknown or of another type."""
    return _unpack(envelope, Reply)


def _unpack(envelope: Envelope, kind: type[M]) -> M:
    known = {f.name for f in fields(kind)} - set(_ARRAYS[kind])
    try:
        plain = json.loads(envelope.about, parse_constant=_finite, parse_float=_finite)
        if isinstance(plain, dict) and set(plain) == known:
            groups = {name: dict(group) for name, group in envelope.arrays.items()}
            message: M = _DECODERS[kind].validate_python({**plain, **groups})
            return message
    except (ValueError, RecursionError):  # JSON's and pydantic's errors are ValueErrors
        # What was in it stays unsaid: the text may hold what the sender should not have sent.
        log.warning("a message that is not a %s was refused", kind.__name__.lower())
    raise FederationError(
        f"A message does not have the fields of a {kind.__name__.lower()}. Coordinator and "
        "hospitals must run the same version of medfl; compare `--version` on both."
    )


def _finite(text: str) -> float:
    """JSON's numbers without NaN, Infinity and 1e999: one of them would spoil every sum."""
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is not finite")
    return value


def refusal(site: str, error: Exception, round_: int) -> Reply:
    """The answer of a hospital that cannot or will not do it.

    What leaves the hospital is one of a few fixed phrases: an error's text may name files and
    patients.
    """
    phrases = (phrase for kind, phrase in _REFUSALS.items() if isinstance(error, kind))
    other = _BY_NAME.get(type(error).__name__, UNEXPECTED)
    return Reply(site=site, round=round_, refusal=next(phrases, other))
