"""Secure sums between values in this process, and small federations; all messages can be seen."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.client.hospital import Hospital, answer
from medfl.common import config
from medfl.common.errors import MedflError
from medfl.common.messages import Envelope, Instruction, Reply, pack, refusal
from medfl.common.secure.collector import Collector
from medfl.common.secure.exchange import Agreement, Exchange, Present, Revealed, threshold_of
from medfl.common.secure.member import Member, advertise, agree, mask, unmask
from medfl.common.secure.rings import Ring, Words, to_wire
from medfl.common.signing import public_of
from medfl.common.site import Policy
from medfl.common.study import Study
from medfl.server.rounds import Outcome, run_study
from medfl.simulations.sites import SimulatedRun, find_hospitals

FULL = Ring(4)
EXCHANGE = Exchange(study="s" * 64, run="main", round=3, attempt=0)


@dataclass
class Table:
    """Sites around a table, and all that lies on it: what a coordinator receives."""

    names: tuple[str, ...]
    ring: Ring = FULL
    share: float = 2 / 3
    fewest: int = 2
    exchange: Exchange = EXCHANGE
    received: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.identities = {n: Ed25519PrivateKey.generate() for n in self.names}
        self.members: dict[str, Member] = {}

    def key_of(self, site: str) -> str | None:
        key = self.identities.get(site)
        return None if key is None else public_of(key)

    def advertise(self, but: Collection[str] = ()) -> Agreement:
        self.members = {
            n: advertise(self.exchange, n, self.identities[n]) for n in self.names if n not in but
        }
        threshold = threshold_of(self.share, len(self.members))
        adverts = tuple(self.members[n].advert for n in sorted(self.members))
        return Agreement(self.exchange, threshold, 64, adverts)

    def agree(self, site: str, agreement: Agreement):
        threshold = threshold_of(self.share, len(agreement.adverts))
        self.members[site], outbox = agree(
            self.members[site],
            agreement,
            threshold=threshold,
            fewest=self.fewest,
            key_of=self.key_of,
        )
        return outbox

    def mask(self, site: str, present: Present, words: Words) -> Words:
        self.members[site], masked = mask(self.members[site], present, words, fewest=self.fewest)
        return masked

    def unmask(self, site: str, asked) -> Revealed:
        self.members[site], revealed = unmask(self.members[site], asked, fewest=self.fewest)
        return revealed

    def play(
        self,
        updates: dict[str, Words],
        *,
        no_keys: Collection[str] = (),
        no_shares: Collection[str] = (),
        no_update: Collection[str] = (),
        no_unmasking: Collection[str] = (),
        order: Callable[[Iterable[str]], Iterable[str]] = sorted,
    ) -> Words:
        """The sum as the coordinator gets it, where some sites fall silent at each step."""
        agreement = self.advertise(no_keys)
        collector = Collector(agreement, self.ring, len(next(iter(updates.values()))))
        for site in order(agreement.sites):
            if site not in no_shares:
                collector.post(site, self.agree(site, agreement))
        present = collector.present()
        for site in order(present.sites):
            if site not in no_update:
                sent = to_wire(self.mask(site, present, updates[site]), self.ring)
                self.received.append(sent.tobytes())
                assert collector.add(site, sent)
        alive = [s for s in present.sites if s not in no_update]
        revealed = {
            s: self.unmask(s, collector.ask(s)) for s in order(alive) if s not in no_unmasking
        }
        return collector.total(revealed)


@pytest.fixture
def updates() -> Callable[..., dict[str, Words]]:
    """updates(names, ring, n): small integers of both signs as words of the ring, by site."""

    def make(names: Iterable[str], ring: Ring = FULL, n: int = 1000) -> dict[str, Words]:
        rng = np.random.default_rng(5)
        return {s: rng.integers(-900, 900, n).astype(ring.dtype) for s in names}

    return make


@pytest.fixture
def table() -> type[Table]:
    """Table(names, ...): a secure sum among them."""
    return Table


# Federations of hospitals that are files on this machine.

HOSPITALS = tuple(f"h{i}" for i in range(5))
Spoil = Callable[[Instruction, Reply], Reply]


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One CSV a hospital: 60 to 100 patients whose risk is a noisy sum of six numbers."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(11)
    truth = np.array([1.5, -1.0, 0.8, 0.0, -0.6, 0.4])
    for number, name in enumerate(HOSPITALS):
        n = 60 + 10 * number
        x = rng.normal(loc=0.1 * number, size=(n, len(truth)))
        y = rng.random(n) < 1 / (1 + np.exp(-2 * (x @ truth)))
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow([*(f"f{i}" for i in range(len(truth))), "label", "split"])
            for i in range(n):
                split = "test" if i % 3 == 0 else "train"
                lines.writerow([*(f"{v:.6f}" for v in x[i]), "yes" if y[i] else "no", split])
    return folder


@pytest.fixture(scope="session")
def table_study() -> Callable[..., Study]:
    """table_study(secure={...} or None, **federation): the study of these tables."""

    def make(secure: dict[str, Any] | None, **federation: Any) -> Study:
        more = {} if secure is None else {"secure_aggregation": secure}
        privacy = federation.pop("privacy", None)
        if privacy is not None:
            more["privacy"] = privacy
        sites = [{"name": n, "data": {"format": "table", "path": f"{n}.csv"}} for n in HOSPITALS]
        return config.parse(
            {
                "name": "tables",
                "task": {"kind": "risk", "classes": ["no", "yes"]},
                "record": {
                    "features": [{"name": f"f{i}"} for i in range(6)],
                    "scale": "none",
                },
                "model": {"name": "mlp", "options": {"hidden": [8]}},
                "training": {"learning_rate": 0.1, "batch_size": 16, "local_epochs": 1},
                "federation": {"rounds": 3, "min_sites": 2, **federation},
                "evaluation": {"split": "given", "validation": 0.0, "bootstrap": 0},
                "simulation": {"sites": sites},
                **more,
            },
            Study,
            "study",
        )

    return make


@dataclass
class Wire:
    """The hospitals of a run in this process, and everything that they ever answered.

    silent: steps at which sites do not answer, as {kind: names}. spoil: changes an answer.
    """

    hospitals: list[Hospital]
    silent: dict[str, Collection[str]] = field(default_factory=dict)
    spoil: Spoil = lambda asked, reply: reply
    asked: list[tuple[str, Instruction]] = field(default_factory=list)
    heard: list[tuple[str, Envelope]] = field(default_factory=list)

    def names(self) -> list[str]:
        return [str(i) for i in range(len(self.hospitals))]

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for address, asked in instructions:
            hospital = self.hospitals[int(address)]
            self.asked.append((hospital.name, asked))
            if hospital.name in self.silent.get(asked.kind, ()):
                yield Reply(site=hospital.name, round=asked.round, refusal="late")
                continue
            try:
                reply = answer(hospital, asked)
            except MedflError as error:
                reply = refusal(hospital.name, error, asked.round)
            reply = self.spoil(asked, reply)
            self.heard.append((asked.kind, pack(reply)))
            yield reply


@pytest.fixture
def wire(tables: Path, tmp_path: Path) -> Callable[..., Wire]:
    """wire(study, **policy): the hospitals, each with this policy, and what they say."""
    runs = iter(range(1000))

    def make(study: Study, **policy: Any) -> Wire:
        found = find_hospitals(study, tables, tmp_path / "cache")
        planned = SimulatedRun("main", study, found, tmp_path / f"run-{next(runs)}")
        hospitals = [planned.hospital(node) for node in range(1, len(found) + 1)]
        return Wire([replace(h, policy=Policy(**policy)) for h in hospitals])

    return make


@pytest.fixture
def train() -> Callable[..., Outcome]:
    """train(wire): run the study of these hospitals."""

    def run(wire: Wire, seed: int = 1) -> Outcome:
        return run_study(wire.hospitals[0].study, wire, seed=seed)

    return run
