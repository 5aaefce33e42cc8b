"""Runs of studies as files: commands ask for them, the server works them off, all can look.

runs/<id>/run.json        what was asked and how far it is     runs/<id>/stop    asks it to end
runs/<id>/finish          asks it to train no further, and to measure what it has
runs/<id>/progress.jsonl  one line a round                     runs/<id>/model.safetensors
runs/<id>/checkpoint-*    where it stands (`medfl.server.checkpoint`)

waiting -> running -> done, or failed, stopped or paused; `resume` makes these three wait again, and
so does the next start of the server with what was running when it ended.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, ValidationError

from medfl.common.config import decoded
from medfl.common.coordination import Published
from medfl.common.errors import ConfigError, StorageError
from medfl.common.kept import load_record, save_record
from medfl.common.private_files import private_folder, write_private
from medfl.common.signing import canonical
from medfl.server.federation import Federation
from medfl.server.records import RoundRecord

State = Literal["waiting", "running", "done", "failed", "stopped", "paused"]
# In the state folder: it was put back, and nobody has confirmed who takes part (`backup.py`).
UNCONFIRMED = "unconfirmed"
# Nothing more happens by itself.
OVER = ("done", "failed", "stopped", "paused")


@dataclass(frozen=True, slots=True)
class Run:
    """One run. created: seconds since 1970. wait_s: for the quorum. why: of a bad or early end.

    missing: sites that are waited for, each with the reason; once it runs, those that take no part.
    exit_code: as `medfl-server run`.
    model: SHA-256 of the model file, "" before there is one. attempt: how often it was taken up
    again.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    id: str
    study: str
    digest: str
    seed: int
    created: float
    wait_s: float
    deadline_s: float
    rounds: int
    state: State = "waiting"
    round: int = 0
    ended: float = 0.0
    sites: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    why: str = ""
    exit_code: int = 0
    model: str = ""
    attempt: int = 0


def folder_of(federation: Federation, run_id: str) -> Path:
    """A run's folder. Raises ConfigError for what could be a path."""
    if not run_id or set(run_id) - set("abcdefghijklmnopqrstuvwxyz0123456789-_"):
        raise ConfigError(f"{run_id!r}: is no run; `medfl-server runs` lists them")
    return federation.folder / "runs" / run_id


def ask(
    federation: Federation,
    study: Published,
    rounds: int,
    *,
    seed: int,
    wait_s: float,
    deadline_s: float,
) -> Run:
    """Put a run in the queue."""
    now = federation.clock()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    run = Run(
        id=f"{study.name}-{stamp}-{secrets.token_hex(2)}",
        study=study.name,
        digest=study.digest,
        seed=seed,
        created=now,
        wait_s=wait_s,
        deadline_s=deadline_s,
        rounds=rounds,
    )
    private_folder(folder_of(federation, run.id).parent)
    federation.record("run asked for", run=run.id, study=study.digest, seed=seed)
    save(federation, run)
    return run


def save(federation: Federation, run: Run) -> None:
    """Replace the run's record."""
    save_record(folder_of(federation, run.id) / "run.json", run)


def load(federation: Federation, run_id: str) -> Run:
    """Raises ConfigError where there is no such run."""
    found = load_record(folder_of(federation, run_id) / "run.json", Run)
    if found is None:
        raise ConfigError(f"{run_id}: is no run; `medfl-server runs` lists them")
    return found


def everything(federation: Federation) -> list[Run]:
    """All runs, oldest first."""
    found = (load_record(p, Run) for p in (federation.folder / "runs").glob("*/run.json"))
    return sorted((r for r in found if r is not None), key=lambda r: (r.created, r.id))


def latest(federation: Federation, study: str) -> Run | None:
    """The newest run of a study that is not over, so that asking twice starts one."""
    open_ = [r for r in everything(federation) if r.study == study and r.state not in OVER]
    return open_[-1] if open_ else None


def queued_behind(federation: Federation, run: Run) -> str:
    """What a waiting run waits for before its turn comes; "" where it is its turn."""
    if run.state != "waiting":
        return ""
    if (federation.state / UNCONFIRMED).exists():
        return (
            "this state was put back from a backup; nothing runs until somebody has compared "
            "the hospitals and said: medfl-server confirm-restore"
        )
    before = [r for r in everything(federation) if r.state not in OVER and r.id != run.id]
    running = [r for r in before if r.state == "running" or r.created < run.created]
    if not running:
        return ""
    first = min(running, key=lambda r: (r.state != "running", r.created, r.id))
    where = f"round {first.round} of {first.rounds}"
    return f"queued: one run at a time, and {first.id} is {first.state}, {where}"


def stop(federation: Federation, run_id: str) -> bool:
    """Ask a run to end after its present round; False where it is over."""
    run = load(federation, run_id)
    if run.state in OVER:
        return False
    federation.record("run to be stopped", run=run.id)
    (folder_of(federation, run_id) / "stop").touch(mode=0o600)
    return True


def finish(federation: Federation, run_id: str) -> bool:
    """Ask a run to train no further and to measure what it has; False where it is over."""
    run = load(federation, run_id)
    if run.state in OVER:
        return False
    federation.record("run to be finished", run=run.id)
    (folder_of(federation, run_id) / "finish").touch(mode=0o600)
    return True


def resume(federation: Federation, run_id: str) -> Run:
    """Put a run that ended without a model back in the queue; it goes on after its last round.

    Raises:
        ConfigError: it has its model, or it is not over.
    """
    run = load(federation, run_id)
    if run.state == "done":
        raise ConfigError(f"{run_id}: is done; get its model with: medfl-server model get {run_id}")
    if run.state not in OVER:
        raise ConfigError(f"{run_id}: is {run.state}; it needs no resuming")
    (folder_of(federation, run_id) / "stop").unlink(missing_ok=True)
    federation.record("run to be resumed", run=run_id)
    return _again(federation, run)


def take_up(federation: Federation) -> list[Run]:
    """Put the runs that a server left running back in the queue."""
    left = [run for run in everything(federation) if run.state == "running"]
    return [_again(federation, run) for run in left]


def _again(federation: Federation, run: Run) -> Run:
    queued = replace(
        run, state="waiting", attempt=run.attempt + 1, why="", exit_code=0, ended=0.0, missing=()
    )
    save(federation, queued)
    return queued


def is_to_stop(federation: Federation, run_id: str) -> bool:
    """Whether somebody asked for its end."""
    return (folder_of(federation, run_id) / "stop").exists()


def is_to_finish(federation: Federation, run_id: str) -> bool:
    """Whether somebody asked to train no further."""
    return (folder_of(federation, run_id) / "finish").exists()


def end(federation: Federation, run: Run, state: State, why: str, exit_code: int) -> Run:
    """Write down how it ended."""
    over = replace(run, state=state, why=why, exit_code=exit_code, ended=federation.clock())
    federation.record(f"run {state}", run=run.id, why=why[:500], rounds=over.round)
    save(federation, over)
    return over


def add_round(federation: Federation, run_id: str, record: RoundRecord) -> None:
    """One line of progress. Raises StorageError."""
    path = _progress_file(federation, run_id)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(_line(record))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def progress(federation: Federation, run_id: str) -> list[RoundRecord]:
    """The rounds so far; an unfinished last line is left out."""
    path, found = _progress_file(federation, run_id), []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                found.append(decoded(line, RoundRecord))
            except ValidationError:
                continue
    return found


def rewind(federation: Federation, run_id: str, last: RoundRecord) -> list[RoundRecord]:
    """Make `last` the last line of progress, and return all: the run goes on after it."""
    kept = [r for r in progress(federation, run_id) if r.round < last.round] + [last]
    write_private(_progress_file(federation, run_id), b"".join(_line(r) for r in kept))
    return kept


def forget(federation: Federation, run_id: str) -> None:
    """Drop the progress of a run that begins again from nothing."""
    _progress_file(federation, run_id).unlink(missing_ok=True)


def _progress_file(federation: Federation, run_id: str) -> Path:
    return folder_of(federation, run_id) / "progress.jsonl"


def _line(record: RoundRecord) -> bytes:
    return canonical(asdict(record)) + b"\n"


def model_of(federation: Federation, run_id: str) -> Path:
    """The run's model file, checked against the record.

    Raises:
        ConfigError: the run has none. StorageError: the file is not what was written.
    """
    run = load(federation, run_id)
    path = folder_of(federation, run_id) / "model.safetensors"
    if not run.model or not path.exists():
        raise ConfigError(f"{run_id}: has no model; it is {run.state}. {run.why}".rstrip())
    if sha256(path) != run.model:
        raise StorageError(f"{path}: is not the file that the run wrote; restore the backup")
    return path


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
