"""The report of a run between hospitals, and the coordinator's word for it and for the model.

outcome -> runs/<id>/result.json, study.json, rounds.jsonl -> report.html, model_card.md
digests of model, result, report and card -> signed.json (Ed25519) and one line of the audit log
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict

from medfl.common import study_text, tensors
from medfl.common.errors import ConfigError, MedflError, StorageError
from medfl.common.kept import load_record, save_record
from medfl.common.messages import Reply
from medfl.common.metrics import mean_over_sites
from medfl.common.signing import canonical, is_signed, public_of, sign
from medfl.common.study import Study
from medfl.server import runs, studies
from medfl.server.ending import ended_early
from medfl.server.federation import Federation
from medfl.server.records import bytes_per_round, finite
from medfl.server.report.write import write_report
from medfl.server.runs import Run

if TYPE_CHECKING:
    from medfl.server.records import RoundRecord
    from medfl.server.rounds import Outcome

log = logging.getLogger(__name__)

PURPOSE = "results of a run"
REPORT, CARD, SIGNED = "report.html", "model_card.md", "signed.json"
MODEL, RESULT = "model.safetensors", "result.json"


@dataclass(frozen=True, slots=True)
class Signed:
    """What the coordinator vouches for. study: digest; the others: SHA-256 of the files, result
    of result.json with every number of the report.

    coordinator: its public key, hex, which hospitals have pinned. signature: over all the rest.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    run: str
    study: str
    model: str
    result: str
    report: str
    card: str
    coordinator: str
    signature: str = ""


def finish(
    federation: Federation,
    run: Run,
    study: Study,
    outcome: Outcome,
    stopped_after: int | None = None,
) -> None:
    """Leave the report of a run whose model is saved; a report that fails does not cost the run.

    stopped_after: the last round of a run that a person has stopped.
    """
    folder = runs.folder_of(federation, run.id)
    try:
        rounds = runs.progress(federation, run.id)
        plain = facts(run, study, outcome, rounds, _absent(federation, run))
        if stopped_after is not None:
            plain["stopped_after"] = stopped_after
        _keep_facts(folder, study, plain, rounds)
        write(federation, run.id)
    except MedflError as error:
        log.error("run=%s has its model and no report: %s", run.id, error)
        federation.record("report failed", run=run.id, why=str(error)[:500])


def write(federation: Federation, run_id: str) -> Signed:
    """Draw the report from the run's files, sign it with the model, and note both in the log.

    Raises:
        ConfigError: the run has no model. StorageError: a file is missing or cannot be written.
    """
    folder = runs.folder_of(federation, run_id)
    model = runs.sha256(folder / MODEL) if (folder / MODEL).exists() else ""
    if not model:
        raise ConfigError(f"{run_id}: has no model, so there is no report")
    write_report(folder)
    key = federation.signing_key()
    bare = Signed(
        run=run_id,
        study=runs.load(federation, run_id).digest,
        model=model,
        result=runs.sha256(folder / RESULT),
        report=runs.sha256(folder / REPORT),
        card=runs.sha256(folder / CARD),
        coordinator=public_of(key),
    )
    made = Signed(**{**asdict(bare), "signature": sign(key, PURPOSE, _covered(bare))})
    federation.record("report", run=run_id, sha256=made.report, card=made.card, model=model)
    save_record(folder / SIGNED, made)
    return made


def opened(federation: Federation, run_id: str) -> Signed:
    """The signed results of a run, its files checked against them; written where they are missing.

    Raises:
        ConfigError: no such run, or one without a model.
        StorageError: a file or the signature is not what the run wrote.
    """
    run, folder = runs.load(federation, run_id), runs.folder_of(federation, run_id)
    if run.state != "done" and not run.model:
        raise ConfigError(f"{run_id}: has no report; it is {run.state}. {run.why}".rstrip())
    signed = load_record(folder / SIGNED, Signed)
    if signed is None:
        return write(federation, run_id)
    own = public_of(federation.signing_key())
    files = {
        MODEL: signed.model,
        RESULT: signed.result,
        REPORT: signed.report,
        CARD: signed.card,
    }
    changed = [n for n, digest in files.items() if not _is(folder / n, digest)]
    if signed.coordinator != own or not is_signed(own, PURPOSE, _covered(signed), signed.signature):
        changed.append(SIGNED)
    if changed:
        raise StorageError(
            f"{folder}: {', '.join(changed)} is not what the run wrote; restore the backup"
        )
    return signed


def facts(
    run: Run,
    study: Study,
    outcome: Outcome,
    rounds: Sequence[RoundRecord],
    absent: Mapping[str, str],
) -> dict[str, Any]:
    """result.json: what the coordinator learned, and nothing that a hospital did not tell.

    absent: hospitals that were not asked, and why.
    """
    tests = [dict(r.metrics.get("test", {})) for r in outcome.final]
    up, down = bytes_per_round(rounds)
    return {
        "kind": "federation",
        "run": run.id,
        "study": study.name,
        "title": study.title,
        "purpose": study.purpose,
        "digest": study.digest,
        "task": asdict(study.task),
        "strategy": study.federation.strategy,
        "seed": run.seed,
        "rounds": study.federation.rounds,
        **ended_early(outcome.ending, study.federation),
        "seconds": round(outcome.seconds, 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime(run.created)),
        "selected_round": outcome.selected_round,
        "sites": [_site(reply) for reply in outcome.final],
        "external": [_site(reply) for reply in outcome.external],
        "mean": mean_over_sites([t for t in tests if t]),
        "baselines": {},
        "refused": _took_no_part(outcome, absent),
        "unlike": {site: list(fields) for site, fields in outcome.unlike.items()},
        "environment": {p: version(p) for p in ("medfl", "torch", "flwr")},
        "digests": {"study": study.digest, "model": tensors.digest(outcome.weights)},
        "cohorts": {r.site: r.cohort for r in outcome.final if r.cohort},
        "n_parameters": int(sum(a.size for a in tensors.floats(outcome.weights).values())),
        "bytes_per_round": up + down,
        "bytes_up_per_round": up,
        "bytes_down_per_round": down,
    }


def _took_no_part(outcome: Outcome, absent: Mapping[str, str]) -> dict[str, str]:
    """Without who answered in all rounds: a restart does not find every hospital again at once."""
    there = [{site["name"] for site in record.sites} for record in outcome.records]
    found = {**absent, **outcome.refused}
    return {
        site: why
        for site, why in found.items()
        if not there or not all(site in names for names in there)
    }


def _site(reply: Reply) -> dict[str, Any]:
    """A private hospital tells no counts, and no metrics without a price."""
    return {
        "name": reply.site,
        "n_train": reply.counts.get("train"),
        "n_validation": reply.counts.get("validation"),
        "n_test": reply.counts.get("test"),
        "metrics": dict(reply.metrics.get("test", {})),
        "intervals": {},
        "epsilon": reply.epsilon,
        "delta": reply.target_delta,
        "quarantined": dict(reply.left_out),
    }


def _absent(federation: Federation, run: Run) -> dict[str, str]:
    """Hospitals of the federation that the run went on without, and why."""
    found = {}
    for record in federation.sites():
        if record.status == "active" and record.name not in run.sites:
            decision = studies.decision_of(federation, run.digest, record.name)
            why = studies.refusal(federation, record, decision, run.digest)
            found[record.name] = why or "not connected"
    return found


def _keep_facts(
    folder: Path, study: Study, plain: dict[str, Any], rounds: Sequence[RoundRecord]
) -> None:
    lines = [canonical(finite({**asdict(r), "run": "main"})) + b"\n" for r in rounds]
    text = json.dumps(finite(plain), indent=2, allow_nan=False)
    tensors.write_atomic(folder / "study.json", study_text.to_text(study).encode())
    tensors.write_atomic(folder / "rounds.jsonl", b"".join(lines))
    tensors.write_atomic(folder / RESULT, text.encode())


def _covered(signed: Signed) -> dict[str, Any]:
    return {key: value for key, value in asdict(signed).items() if key != "signature"}


def _is(path: Path, digest: str) -> bool:
    return path.exists() and runs.sha256(path) == digest
