"""Where a run stands after a round, on disk, so that a coordinator that died goes on from there.

    runs/<id>/checkpoint-00007.safetensors   model, control variate, optimiser state, best model
        its metadata: who takes part, what they share, the round's record; and the coordinator's
        signature over study, run and everything in the file

The last two are kept: one that is torn, edited or another run's is passed over aloud, and the round
after the one before is trained again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter

from medfl.common import statistics, tensors
from medfl.common.errors import StorageError
from medfl.common.resting import rested
from medfl.common.signing import SigningKey, canonical, is_signed, public_of, sign
from medfl.common.tensors import Array, Tensors
from medfl.server.records import Best, RoundRecord
from medfl.server.roster import Prepared
from medfl.strategies.strategy import ServerState

log = logging.getLogger(__name__)

_PURPOSE = "checkpoint"
_KEPT = 2
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Model:
    """What changes from round to round.

    digest: of `weights`. control: the coordinator's control variate (SCAFFOLD). state: of the
    server's optimiser.
    """

    weights: Tensors
    digest: str
    control: Tensors
    state: ServerState
    best: Best


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run after `record.round`: all that the next round starts from."""

    prepared: Prepared
    model: Model
    record: RoundRecord


@dataclass(frozen=True, slots=True)
class _About:
    """What a checkpoint says beside its arrays."""

    study: str
    run: str
    roster: dict[str, str]
    cases: dict[str, int]
    shared: dict[str, Any]
    refused: dict[str, str]
    unlike: dict[str, tuple[str, ...]]
    server_rounds: int
    best_metric: str | None
    best_round: int
    best_value: float | None
    record: dict[str, Any]
    best_sites: dict[str, float] = field(default_factory=dict)
    best_no_better: int = 0
    evaluators: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run. folder: of the run. key: the coordinator's, that signs them."""

    folder: Path
    key: SigningKey = field(repr=False)
    study: str
    run: str

    def keep(self, checkpoint: Checkpoint) -> None:
        """Write it in one atomic step; only the last two stay.

        Raises:
            StorageError: the disk refused; the earlier ones are as they were.
        """
        model = checkpoint.model
        arrays = dict(_arrays(model))
        about = canonical(asdict(_about(checkpoint, self.study, self.run))).decode()
        signature = sign(self.key, _PURPOSE, _covered(about, model.digest, arrays))
        file = self.folder / _name(checkpoint.record.round)
        tensors.save(arrays, file, {"about": about, "signature": signature})
        file.chmod(0o600)
        for old in self._files()[_KEPT:]:
            old.unlink(missing_ok=True)

    def last(self) -> Checkpoint | None:
        """The newest whole one; what is damaged is named in the log and set aside."""
        for file in self._files():
            try:
                return self._read(file)
            except StorageError as error:
                log.error("%s The run goes on from the checkpoint before it.", error)
                with suppress(OSError):
                    file.replace(file.with_suffix(".damaged"))
        return None

    def drop(self) -> None:
        """Remove all: the run is over and its model is written."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"), reverse=True)

    def _read(self, file: Path) -> Checkpoint:
        arrays = tensors.load(file)
        words = tensors.metadata(file)
        text, signature = words.get("about", ""), words.get("signature", "")
        weights = _group(arrays, "weights")
        digest = tensors.digest(weights)
        covered = _covered(text, digest, arrays)
        if not is_signed(public_of(self.key), _PURPOSE, covered, signature):
            raise StorageError(f"{file}: is not as this coordinator wrote it.")
        try:
            about = _decoded(json.loads(text), _About)
            record = _decoded(about.record, RoundRecord)
            prepared = _prepared(about)
        except (ValueError, TypeError):  # pydantic's errors are ValueErrors
            raise StorageError(f"{file}: was written by another version of medfl.") from None
        if (about.study, about.run) != (self.study, self.run):
            raise StorageError(f"{file}: belongs to another run.")
        if file.name != _name(record.round):
            # An older one under a newer name would turn the run back.
            raise StorageError(f"{file}: is the checkpoint of round {record.round}.")
        return Checkpoint(prepared, _model(about, digest, arrays), record)


def _name(round_: int) -> str:
    return f"checkpoint-{round_:05d}.safetensors"


def _about(checkpoint: Checkpoint, study: str, run: str) -> _About:
    prepared, model = checkpoint.prepared, checkpoint.model
    return _About(
        study=study,
        run=run,
        roster=dict(prepared.roster),
        cases=dict(prepared.cases),
        shared=dict(statistics.statistics_to_plain(prepared.shared)),
        refused=prepared.refused,
        unlike=dict(prepared.unlike),
        server_rounds=model.state.round,
        best_metric=model.best.metric,
        best_round=model.best.round,
        best_value=model.best.value,
        record=asdict(checkpoint.record),
        best_sites=dict(model.best.sites),
        best_no_better=model.best.no_better,
        evaluators=dict(prepared.evaluators),
    )


def _prepared(about: _About) -> Prepared:
    shared = statistics.shared_from_plain(about.shared)
    return Prepared(
        about.roster, about.cases, shared, about.refused, about.unlike, about.evaluators
    )


def _arrays(model: Model) -> Iterator[tuple[str, Array]]:
    """All arrays of a model under `group/name`, or `slots/slot/name`."""
    for group in ("weights", "control"):
        yield from ((f"{group}/{n}", np.asarray(a)) for n, a in getattr(model, group).items())
    for slot, named in model.state.slots.items():
        yield from ((f"slots/{slot}/{n}", np.asarray(a)) for n, a in named.items())
    yield from ((f"best/{n}", np.asarray(a)) for n, a in model.best.weights.items())


def _model(about: _About, digest: str, arrays: Tensors) -> Model:
    found: dict[str, dict[str, Array]] = {}
    for name, array in _group(arrays, "slots").items():
        slot, _, rest = name.partition("/")
        found.setdefault(slot, {})[rest] = array
    slots = {slot: rested(named) for slot, named in found.items()}
    best_weights = rested(_group(arrays, "best"))
    best = Best(
        about.best_metric,
        about.best_round,
        about.best_value,
        best_weights,
        about.best_sites,
        about.best_no_better,
    )
    return Model(
        weights=_group(arrays, "weights"),
        digest=digest,
        control=_group(arrays, "control"),
        state=ServerState(about.server_rounds, slots),
        best=best,
    )


def _group(arrays: Tensors, group: str) -> dict[str, Array]:
    prefix = f"{group}/"
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _covered(about: str, weights: str, arrays: Tensors) -> Mapping[str, str]:
    """What is signed. weights: their digest, which is known already where they are written."""
    rest = {n: a for n, a in arrays.items() if not n.startswith("weights/")}
    return {"about": about, "weights": weights, "rest": tensors.digest(rest)}


def _decoded(plain: Any, kind: type[T]) -> T:
    value: T = TypeAdapter(kind).validate_python(plain)
    return value
