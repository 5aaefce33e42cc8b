"""Which rounds and models used a patient's data: one line an event, in a file of the hospital.

A cohort stands by its digest with the keyed hashes of its training patients; a round names the
cohort that it was trained on and the model that it began with, by which the coordinator's log knows
the model that came of it. Nothing here says who anybody is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medfl.client.data.cases import Cohort
from medfl.client.deid.keys import secret_path
from medfl.common.errors import StorageError
from medfl.common.site import Site


def lineage_path(site: Site) -> Path:
    """Beside the site's key."""
    return secret_path(site).with_name(".medfl-lineage.jsonl")


@dataclass(frozen=True, slots=True)
class Used:
    """One round that trained on a cohort. study, cohort: digests. run: the coordinator's name.

    model: digest of the weights that the round began with; its update left the hospital.
    """

    study: str
    run: str
    cohort: str
    round: int
    model: str


def record_round(path: Path, cohort: Cohort, used: Used) -> None:
    """Write down a round before its update leaves, once; the cohort's patients once a cohort.

    Raises:
        StorageError: it could not be made durable; the update must then stay here.
    """
    events, lines = list(_events(path)), list[dict[str, Any]]()
    if asdict(used) in events:
        return
    if not any(event.get("patients") and event["cohort"] == used.cohort for event in events):
        patients = sorted({c.patient for c in cohort.cases if c.split == "train"})
        lines.append({"cohort": used.cohort, "patients": patients})
    lines.append(asdict(used))
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"{path}: the lineage cannot be written ({error.strerror}). Make room; until then no "
            "round may be trained."
        ) from None


def rounds_with(path: Path, patient: str) -> tuple[Used, ...]:
    """The rounds that trained on a patient, in the order in which they were; patient: keyed hash.

    Raises StorageError where the file is damaged.
    """
    events = list(_events(path))
    cohorts = {e["cohort"] for e in events if patient in e.get("patients", ())}
    return tuple(
        Used(e["study"], e["run"], e["cohort"], e["round"], e["model"])
        for e in events
        if "round" in e and e["cohort"] in cohorts
    )


def _events(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            event = json.loads(line)
            if not isinstance(event, dict) or "cohort" not in event:
                raise ValueError("a line of another kind")
            yield event
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: the lineage is damaged ({error}); restore it from the backup"
        ) from None
