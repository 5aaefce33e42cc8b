"""Everything that a private hospital says in a whole run and around it, of two neighbours.

Two hospitals with the same keys, clock and site.toml, one patient apart. docs/privacy.md's table
says of each field whether it is the same, noised, a keyed word or a time; what is in no row, or is
not as its row says, fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context as FlowerContext
from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from medfl.client import consent, witness
from medfl.client.approved import Approved
from medfl.client.cli_federation import _checked
from medfl.client.flower import client_app
from medfl.client.hospital import Hospital
from medfl.client.ledger import Ledger
from medfl.client.premises import Enrolment, Home
from medfl.common import config, study_text, tensors
from medfl.common.coordination import ShowHead
from medfl.common.errors import FederationError
from medfl.common.flower_records import from_record, to_record
from medfl.common.kept import save_record
from medfl.common.messages import Instruction, pack
from medfl.common.private_files import private_folder
from medfl.common.receipts import detach
from medfl.common.signing import new_key, public_of
from medfl.common.site import load_site
from medfl.common.statistics import Shared, statistics_to_plain
from medfl.common.study import Study

DOCS = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"
NOW = 1_800_000_000
STUDY: dict[str, Any] = {
    "name": "tiny",
    "task": {"kind": "risk", "classes": ["no", "yes"]},
    "record": {"features": [{"name": "a", "range": [0, 10]}], "scale": "range"},
    "model": {"name": "logistic"},
    "training": {"local_steps": 2},
    "federation": {"rounds": 2},
    "evaluation": {"split": "given", "metrics": ["accuracy", "auroc"], "bootstrap": 0},
    "privacy": {"epsilon": 4.0, "delta": 1e-3, "sample_rate": 0.5, "metrics_epsilon": 2.0},
    "quality": {"min_cases": 1},
}
SITE = """
name = "north"
[data]
format = "table"
path = "cases.csv"
[privacy]
epsilon = 4.0
delta = 1e-3
declared_patients = 20
declared_cases = 25
"""
Rows = list[str]


def rows(part: str, n: int, first: int = 0) -> Rows:
    return [
        f"{part[:2]}{i}-{k},{part[:2]}{i},{i % 9},{'yes' if i % 2 else 'no'},{part}"
        for i in range(first, first + n)
        for k in range(1 + i % 2)
    ]


BASE = rows("train", 14) + rows("validation", 6) + rows("test", 6)


def without(what: str) -> Rows:
    return [r for r in BASE if not r.endswith(f",{what}")]


# One patient more or less, each where it could show.
NEIGHBOURS: dict[str, tuple[Rows, Rows]] = {
    "one more to train on": (BASE, BASE + rows("train", 1, 14)),
    "one more with two records": (BASE, BASE + rows("train", 1, 15)),
    "one more to validate on": (BASE, BASE + rows("validation", 1, 6)),
    "one more to test on": (BASE, BASE + rows("test", 1, 6)),
    "the only one to train on": (without("train"), without("train") + rows("train", 1)),
    "the only one to validate on": (
        without("validation"),
        without("validation") + rows("validation", 1),
    ),
    "the only one to test on": (without("test"), without("test") + rows("test", 1)),
    "the only one of a class": (
        [r for r in BASE if ",yes," not in r or r.startswith("tr1-")],
        [r for r in BASE if ",yes," not in r],
    ),
    "one whose record is left out": (BASE, [*BASE, "x-0,x,3,perhaps,train"]),
}


@dataclass
class World:
    """A hospital that may be asked, and all that it has said. site: what an approval would read."""

    finder: Approved
    study: Study
    said: list[dict[str, Any]]

    def note(self, what: str, value: Any) -> None:
        for path, leaf in leaves(what, value):
            self.said.append({"field": path, "value": leaf})


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if not value:
            yield path, {}
        for name, inner in value.items():
            yield from leaves(f"{path}.{name}", inner)
    elif isinstance(value, list | tuple):
        yield f"{path}.length", len(value)
        for inner in value:
            yield from leaves(path, inner)
    else:
        yield path, value


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, Rows, dict[str, Any]], World]:
    coordinator = new_key(tmp_path / "coordinator.key")
    own = new_key(tmp_path / "own.key")
    assert own

    def world(name: str, table: Rows, tables: dict[str, Any]) -> World:
        folder = tmp_path / name
        folder.mkdir()
        home = Home(private_folder(folder / "state"), clock=lambda: NOW)
        home.signing_file.write_bytes((tmp_path / "own.key").read_bytes())
        home.signing_file.chmod(0o600)
        (folder / ".medfl-deid.key").write_text("6b" * 32)
        (folder / ".medfl-deid.key").chmod(0o600)
        save_record(home.enrolment_file, Enrolment("north", "h:1", "T", public_of(coordinator), 0))
        study = config.parse({**STUDY, **tables}, Study, "test")
        made = study_text.publish(coordinator, study, 0)
        save_record(home.folder / "studies" / f"{study.digest}.json", made)
        (folder / "cases.csv").write_text("\n".join(["case,patient,a,label,split", *table]) + "\n")
        (folder / "site.toml").write_text(SITE)
        finder = Approved(home, folder / "site.toml", "north")
        return World(finder, study, [])

    return world


class Listener:
    """The coordinator's end of the line: hears, and answers nothing."""

    def __init__(self, world: World) -> None:
        self._world = world

    def call(self, method: str, message: Any, answer: type) -> Any:
        self._world.note("heads" if isinstance(message, ShowHead) else "approval", said(message))
        raise FederationError("heard")


def said(message: Any) -> Any:
    plain = asdict(message)
    return plain.get("decision", plain)


def told(world: World, step: Callable[[], Any]) -> None:
    with pytest.raises(FederationError, match="heard"):
        step()


def approve(world: World) -> None:
    home, line = world.finder.home, Listener(world)
    site = load_site(world.finder.site_file)
    decision = consent.approve(home, world.study, _checked(home, site, world.study), 30)
    told(world, lambda: consent.send(home, line, decision))


def heads(world: World) -> None:
    """As the client exchanges them every few minutes."""
    site = load_site(world.finder.site_file)
    told(world, lambda: witness.exchange(world.finder.home, Listener(world), Ledger(site.ledger)))


def ask(world: World, kind: Any, **more: Any) -> None:
    """Over Flower's message, as the coordinator gets the answer."""
    asked = Instruction(kind=kind, study_digest=world.study.digest, run="r", seed=1)
    if kind != "prepare":
        weights = {
            "1.weight": np.full((1, 1), more.pop("value", 0.0), np.float32),
            "1.bias": np.zeros(1, np.float32),
        }
        shared = statistics_to_plain(Shared(private=True))
        digest = tensors.digest(weights)
        asked = replace(asked, weights=weights, model=digest, shared=shared)
    asked = replace(asked, **more)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    types = {"prepare": "query.prepare", "round": "train.round", "finish": "evaluate.finish"}
    message = message_from_proto(message_to_proto(Message(to_record(pack(asked)), 1, types[kind])))
    context = FlowerContext(1, 1, {}, RecordDict(), {"study": world.study.digest})
    envelope, sealed = detach(from_record(client_app(world.finder)(message, context).content))
    world.note("answer", json.loads(envelope.about))
    for group, named in sorted(envelope.arrays.items()):
        world.note(f"answer.{group}", {n: a for n, a in sorted(named.items())})
    assert sealed is not None
    world.note("seal", asdict(sealed))


def whole_run(world: World) -> None:
    approve(world)
    heads(world)
    ask(world, "prepare")
    both = ("validation", "test")
    for number in (1, 2):
        ask(world, "round", round=number, parts=("validation",), value=0.1 * number)
        heads(world)
    ask(world, "finish", round=2, parts=("validation",), value=0.5)
    ask(world, "finish", round=2, parts=both, value=0.5)
    heads(world)
    # And what is refused: its words could tell as well.
    ask(world, "round", round=9, parts=("validation",))
    ask(world, "finish", round=2, parts=("train",), value=0.5)
    ask(world, "round", round=1, parts=("validation",), value=0.7)
    heads(world)
    home = world.finder.home
    withdrawn = consent.withdraw(home, world.study.digest)
    told(world, lambda: consent.send(home, Listener(world), withdrawn))
    ask(world, "round", round=2, parts=("validation",), value=0.2)
    heads(world)


def documented() -> dict[str, str]:
    """docs/privacy.md: field -> same, noised, keyed or time."""
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index("### Field by field") :]
    found: dict[str, str] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) >= 2:
            for name in re.findall(r"`([^`]+)`", cells[0]):
                found[name] = cells[1]
        if line.startswith("## "):
            break
    return found


def row_of(field: str, table: Mapping[str, str]) -> str:
    """The row of the field or of the group that it is in."""
    parts = field.split(".")
    for n in range(len(parts), 0, -1):
        if (name := ".".join(parts[:n])) in table:
            return table[name]
    return ""


def shape_of(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype)
    # A number stands for a number, and for a quotient that noise left undefined.
    return "number" if value is None or isinstance(value, int | float) else value


def differences(one: World, other: World) -> list[str]:
    table = documented()
    assert [s["field"] for s in one.said] == [s["field"] for s in other.said]
    faults = []
    for left, right in zip(one.said, other.said, strict=True):
        field, a, b = left["field"], left["value"], right["value"]
        how = row_of(field, table)
        if how == "same":
            fits = np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        elif how == "noised":
            fits = shape_of(a) == shape_of(b)
        elif how in ("keyed", "time"):
            fits = type(a) is type(b) and (how == "time" or len(a) == len(b))
        else:
            fits = False
        if not fits:
            faults.append(f"{field} ({how or 'in no row'}): {a!r} and {b!r}")
    return faults


UNPRICED = {"privacy": {k: v for k, v in STUDY["privacy"].items() if k != "metrics_epsilon"}}


@pytest.mark.parametrize("priced", [True, False])
@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_no_message_tells_of_one_patient(
    make: Callable[[str, Rows, dict[str, Any]], World], pair: str, priced: bool
) -> None:
    worlds = []
    for name, table in zip(("one", "other"), NEIGHBOURS[pair], strict=True):
        world = make(name, table, {} if priced else UNPRICED)
        whole_run(world)
        worlds.append(world)
    assert differences(*worlds) == []
    fields = {s["field"] for s in worlds[0].said}
    assert {"approval.cases", "answer.delta.1.weight", "heads.ledger.n", "seal.content"} <= fields
    refusals = [s["value"] for s in worlds[0].said if s["field"] == "answer.refusal"]
    assert refusals[:5] == [""] * 5
    assert all(refusals[5:])


def exact_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    import medfl.client.hospital as module

    whole = module._round

    def spoiled(hospital: Hospital, asked: Instruction) -> Any:
        return replace(whole(hospital, asked), n_cases=len(hospital.cohort.cases))

    monkeypatch.setitem(module._ANSWERS, "round", spoiled)  # type: ignore[arg-type]


def digest_of_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    import medfl.client.hospital as module

    whole = module._finish

    def spoiled(hospital: Hospital, asked: Instruction) -> Any:
        return replace(whole(hospital, asked), secure={"cohort": hospital.cohort.digest})

    monkeypatch.setitem(module._ANSWERS, "finish", spoiled)  # type: ignore[arg-type]


def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import medfl.client.hospital as module

    def spoiled(hospital: Hospital, asked: Instruction) -> Any:
        reply = module._prepare(hospital, asked)
        return replace(reply, counts={"train": len(hospital.cohort.positions("train"))})

    monkeypatch.setitem(module._ANSWERS, "prepare", spoiled)  # type: ignore[arg-type]


def metrics_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    import medfl.client.hospital as module

    whole = module._round

    def spoiled(hospital: Hospital, asked: Instruction) -> Any:
        reply = whole(hospital, asked)
        few = len(hospital.patients("train")) < 22
        return replace(reply, metrics={}) if few else reply

    monkeypatch.setitem(module._ANSWERS, "round", spoiled)  # type: ignore[arg-type]


def a_line_of_the_log_a_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    seal = Approved.seal

    def spoiled(self: Approved, *given: Any) -> Any:
        if self._last is not None:
            for _ in range(len(set(self._last.hospital.patients("train")))):
                self.home.record("patient")
        return seal(self, *given)

    monkeypatch.setattr(Approved, "seal", spoiled)


@pytest.mark.parametrize(
    "spoil",
    [exact_cases, digest_of_cohort, counts, metrics_where_there_are_enough,
     a_line_of_the_log_a_patient],
)  # fmt: skip
def test_the_capture_notices_what_tells_of_one_patient(
    make: Callable[[str, Rows, dict[str, Any]], World],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch], None],
) -> None:
    spoil(monkeypatch)
    worlds = [make(n, t, {}) for n, t in zip("ab", NEIGHBOURS["one more to train on"], strict=True)]
    for world in worlds:
        whole_run(world)
    try:
        found = differences(*worlds)
    except AssertionError:
        return  # a field is there for one of them only
    assert found
