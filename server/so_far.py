"""What a run has when it ends early, or while it goes on: its model by the last checkpoint.

No hospital is asked for it, so it costs no privacy; its test cases are not measured.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.common import study_text, tensors
from medfl.common.errors import ConfigError
from medfl.common.messages import Reply
from medfl.common.signing import public_of
from medfl.server import runs, studies
from medfl.server.report import federated

if TYPE_CHECKING:
    from medfl.common.study import Study
    from medfl.server.checkpoint import Checkpoint
    from medfl.server.federation import Federation
    from medfl.server.records import RoundRecord
    from medfl.server.runs import Run

log = logging.getLogger(__name__)


def copy(federation: Federation, run_id: str, out: Path) -> tuple[int, str]:
    """Write the best model so far, or the last where the study does not choose, to `out`.

    Returns:
        The round of the model, and the SHA-256 of the file, which the audit log has too.

    Raises:
        ConfigError: no such run, or one without a finished round.
    """
    run = runs.load(federation, run_id)
    last = _checkpoint(federation, run)
    if last is None:
        raise ConfigError(f"{run_id}: has no finished round yet; it is {run.state}. {run.why}")
    round_ = _save(federation, run, last, out)
    digest = runs.sha256(out)
    federation.record("model so far", run=run_id, sha256=digest, round=round_)
    return round_, digest


def leave(federation: Federation, run: Run) -> bool:
    """Give a stopped run a model and a report of its rounds; False where it has no round."""
    from medfl.server.rounds import Outcome

    last = _checkpoint(federation, run)
    if last is None:
        return False
    path = runs.folder_of(federation, run.id) / "model.safetensors"
    round_ = _save(federation, run, last, path)
    digest = runs.sha256(path)
    federation.record("model", run=run.id, sha256=digest, round=round_)
    done = replace(runs.load(federation, run.id), model=digest)
    runs.save(federation, done)
    study, records = _study(federation, run), runs.progress(federation, run.id)
    outcome = Outcome(
        weights=tensors.load(path),
        last=last.model.weights,
        selected_round=round_,
        shared=last.prepared.shared,
        final=_last_words(study, records),
        records=tuple(records),
        seconds=sum(r.seconds for r in records),
        refused=last.prepared.refused,
        unlike=last.prepared.unlike,
    )
    federated.finish(federation, done, study, outcome, stopped_after=last.record.round)
    return True


def _checkpoint(federation: Federation, run: Run) -> Checkpoint | None:
    from medfl.server.checkpoint import Checkpoints

    folder = runs.folder_of(federation, run.id)
    return Checkpoints(folder, federation.signing_key(), run.digest, run.id).last()


def _study(federation: Federation, run: Run) -> Study:
    return study_text.from_text(studies.find(federation, run.digest).study)


def _save(federation: Federation, run: Run, last: Checkpoint, path: Path) -> int:
    """Write the model that would be published now; returns its round."""
    from medfl.server.average import average_of, first_averaged

    study, model, round_ = _study(federation, run), last.model, last.record.round
    how, weights = study.federation, model.weights
    if how.keep == "best" and model.best.value is not None:
        round_, weights = model.best.round, model.best.weights
    elif how.keep == "average" and round_ >= first_averaged(how.rounds):
        weights = average_of(model.state, model.weights)
    about = {
        "study": study.name,
        "study_digest": study.digest,
        "run": run.id,
        "round": str(round_),
        "stopped_after": str(last.record.round),
        "coordinator": public_of(federation.signing_key()),
    }
    tensors.save(weights, path, about)
    path.chmod(0o600)
    return round_


def _last_words(study: Study, records: list[RoundRecord]) -> tuple[Reply, ...]:
    """What each hospital told last: its privacy spent, and no test metrics."""
    last = {str(site["name"]): site for record in records for site in record.sites}
    # Records of before 1 December 2026 have no delta; the study's is that of its own privacy.
    agreed = study.privacy.delta if study.privacy is not None else None
    return tuple(
        Reply(
            site=name,
            epsilon=site["epsilon"],
            target_delta=None if site["epsilon"] is None else site.get("delta", agreed),
        )
        for name, site in sorted(last.items())
    )
