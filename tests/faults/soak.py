"""A day in small: many rounds between real processes while faults are thrown at random.

    python tests/faults/soak.py --rounds 300 --seed 1 --out tests/faults/SOAK.md

In the first half any process is killed and any line cut; in the second the coordinator and the
hospitals' clients live on, so that what they hold can be watched: memory, descriptors, disk. Every
fault heals within the round's deadline, so no hospital may ever be left out, and the model must be
the simulator's, bit for bit. A killed training process is not among them: that costs its hospital
the round (case 18 of the campaign).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.processes import children, until
from harness.world import Site, World, federation_of, same

from medfl.common.study import load_study
from medfl.server import runs
from medfl.simulations.run import Machine, plan_runs, run_all
from medfl.simulations.sites import find_hospitals

NAMES = ("north", "south", "west")
SEED = 7
MEGABYTE = 2**20


@dataclass(frozen=True)
class Weight:
    """What one process holds at one moment."""

    round: int
    who: str
    bytes: int
    descriptors: int


@dataclass
class Soak:
    """The run under faults, and what was seen of it."""

    world: World
    run: str
    dice: random.Random
    thrown: Counter[str] = field(default_factory=Counter)
    weights: list[Weight] = field(default_factory=list)
    disk: list[tuple[int, int]] = field(default_factory=list)

    @property
    def round(self) -> int:
        return self.world.state_of(self.run).round

    # Faults ---------------------------------------------------------------------------------

    def kill_server(self) -> None:
        assert self.world.server is not None
        self.world.server.kill()
        self.world.serve()

    def stop_server(self) -> None:
        assert self.world.server is not None
        assert self.world.server.term() == 0
        self.world.serve()

    def kill_client(self) -> None:
        site = self._site()
        assert site.process is not None
        site.process.kill()
        site.start(until_="")

    def stop_client(self) -> None:
        site = self._site()
        assert site.process is not None
        assert site.process.term() == 0
        site.start(until_="")

    def kill_superlink(self) -> None:
        assert self.world.server is not None
        _kill(children(self.world.server.pid, "medfl.server.superlink"))

    def kill_supernode(self) -> None:
        _kill(self._below("medfl.client.supernode"))

    def cut_line(self) -> None:
        proxy = self._site().proxy
        proxy.cut()
        time.sleep(self.dice.uniform(0.2, 4.0))
        proxy.mend()

    def half_close_line(self) -> None:
        self._site().proxy.half_close()

    def black_hole(self) -> None:
        proxy = self._site().proxy
        proxy.black_hole()
        time.sleep(self.dice.uniform(0.5, 4.0))
        proxy.mend()

    def slow_line(self) -> None:
        proxy = self._site().proxy
        proxy.slow(delay_s=0.05)
        time.sleep(self.dice.uniform(1.0, 5.0))
        proxy.mend()

    def _site(self) -> Site:
        return self.world.sites[self.dice.choice(NAMES)]

    def _below(self, command: str) -> list[int]:
        process = self._site().process
        return [] if process is None else children(process.pid, command)

    # The run --------------------------------------------------------------------------------

    def throw(self, faults: Sequence[Callable[[], None]], until_round: int) -> None:
        """A fault every three to twelve rounds until that round is over."""
        while (now := self.round) < until_round:
            self._reach(min(until_round, now + self.dice.randint(3, 12)))
            if self.round < until_round:
                time.sleep(self.dice.uniform(0.0, 0.5))
                fault = self.dice.choice(faults)
                self.thrown[fault.__name__.replace("_", " ")] += 1
                print(f"round {self.round}: {fault.__name__}", flush=True)
                fault()

    def _reach(self, number: int) -> None:
        began = self.round
        limit_s = 240.0 * max(1, number - began)

        def there() -> bool:
            self._weigh()
            return self.round >= number

        until(there, limit_s, f"round {number}")

    def _weigh(self) -> None:
        """Once a round: what the processes that should live on hold, and the disk."""
        now = self.round
        if self.disk and self.disk[-1][0] == now:
            return
        self.disk.append((now, _size(self.world.folder)))
        server = self.world.server
        assert server is not None
        pids = {"medfl-server": server.pid}
        for pid in children(server.pid, "medfl.server.superlink"):
            pids["SuperLink"] = pid
        for name, site in self.world.sites.items():
            if site.process is not None:
                pids[f"medfl-client {name}"] = site.process.pid
        for who, pid in pids.items():
            if (weight := _weight(now, who, pid)) is not None:
                self.weights.append(weight)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, 9)


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue  # a file between two names
    return total


def _weight(round_: int, who: str, pid: int) -> Weight | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0]) * 1024
        return Weight(round_, who, resident, len(os.listdir(f"/proc/{pid}/fd")))
    except (OSError, IndexError):
        return None  # it has just been replaced


def growth(weights: Sequence[Weight], first: int, last: int) -> dict[str, tuple[float, ...]]:
    """By process: median MB and descriptors in the first and the last third of these rounds."""
    third = (last - first) // 3
    found = {}
    for who in sorted({w.who for w in weights}):
        early = [w for w in weights if w.who == who and first < w.round <= first + third]
        late = [w for w in weights if w.who == who and w.round > last - third]
        if early and late:
            found[who] = (
                statistics.median(w.bytes for w in early) / MEGABYTE,
                statistics.median(w.bytes for w in late) / MEGABYTE,
                statistics.median(w.descriptors for w in early),
                statistics.median(w.descriptors for w in late),
            )
    return found


def faults_of(grown: Mapping[str, Sequence[float]]) -> list[str]:
    """Which process holds more than it should: 10 % and 10 MB more, or 8 descriptors more."""
    return [
        f"{who} grew from {early:.0f} to {late:.0f} MB, {files:.0f} to {more:.0f} descriptors"
        for who, (early, late, files, more) in grown.items()
        if late > 1.1 * early + 10 or more > files + 8
    ]


def simulated(world: World) -> dict[str, object]:
    """The model of the same study and seed without any fault."""
    study = load_study(world.folder / "tiny.toml")
    hospitals = find_hospitals(study, world.folder, world.folder / "simulated-cache")
    planned = plan_runs(study, hospitals, world.folder / "simulated", [], "cpu")
    return dict(run_all(planned, seed=SEED, machine=Machine(workers=1))["main"].weights)


def soak(rounds: int, seed: int) -> tuple[list[str], str]:
    """Run it; what was wrong, and the text of the report."""
    with tempfile.TemporaryDirectory() as folder:
        study = {"rounds": rounds, "min_sites": len(NAMES), "strategy": "fedadam"}
        world = federation_of(Path(folder) / "world", NAMES, study)
        try:
            began = time.monotonic()
            made = Soak(world, world.run(seed=SEED, wait=300, deadline=240), random.Random(seed))
            kills = [made.kill_server, made.stop_server, made.kill_client, made.stop_client]
            kills += [made.kill_superlink]
            lines = [made.cut_line, made.half_close_line, made.black_hole, made.slow_line]
            inner = [made.kill_supernode]
            made.throw([*kills, *lines, *inner], rounds // 2)
            calm = made.round
            made.throw([*lines, *inner], rounds)
            over = world.over(made.run, 300)
            took_s = time.monotonic() - began
            wrong = _wrong(made, over, calm, rounds)
            text = _report(made, over, calm, rounds, seed, took_s, wrong)
        finally:
            world.close()
    return wrong, text


def _wrong(made: Soak, over: runs.Run, calm: int, rounds: int) -> list[str]:
    wrong = faults_of(growth(made.weights, calm, rounds))
    if over.state != "done":
        wrong.append(f"the run is {over.state}: {over.why}")
    rounds_told = made.world.rounds(made.run)
    left_out = [(r["round"], r["left_out"]) for r in rounds_told if r["left_out"]]
    wrong += [f"round {number}: left out {who}" for number, who in left_out]
    if over.state == "done" and not same(made.world.model(made.run), simulated(made.world)):
        wrong.append("the model is not the simulator's")
    return wrong


def _report(
    made: Soak,
    over: runs.Run,
    calm: int,
    rounds: int,
    seed: int,
    took_s: float,
    wrong: Sequence[str],
) -> str:
    first = next(size for number, size in made.disk if number >= calm)
    lines = [
        "# A day in small",
        "",
        f"Written by `make soak`: {rounds} rounds of {len(NAMES)} hospitals (FedAdam), faults "
        f"thrown at random (seed {seed}), {took_s / 60:.0f} minutes. The coordinator took the run "
        f"up {over.attempt} times.",
        "",
        "Verdict: "
        + (
            "; ".join(wrong)
            or "as it should be: nobody was left out of a round, and "
            "the model is the simulator's, bit for bit."
        ),
        "",
        "| fault | times |",
        "|---|---|",
        *(f"| {what} | {n} |" for what, n in sorted(made.thrown.items())),
        "",
        f"What is held, medians over the first and the last third of rounds {calm} to {rounds}:",
        "",
        "| process | MB before | MB after | descriptors before | after |",
        "|---|---|---|---|---|",
    ]
    for who, (early, late, files, more) in growth(made.weights, calm, rounds).items():
        lines.append(f"| {who} | {early:.0f} | {late:.0f} | {files:.0f} | {more:.0f} |")
    last = made.disk[-1][1]
    each = (last - first) / max(1, rounds - calm)
    lines += [
        "",
        f"Disk of all parties together: {last / MEGABYTE:.1f} MB at the end, "
        f"{each / 1024:.1f} kB a round (audit logs, receipts, the engine's database).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """0 where all is as it should be."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rounds", type=int, default=300)
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--out", type=Path)
    options = asked.parse_args()
    wrong, text = soak(options.rounds, options.seed)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
