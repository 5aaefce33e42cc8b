"""A privacy ledger that was cut short, put back or begun anew is noticed on both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from medfl.client import witness
from medfl.client.composition import Charge
from medfl.client.ledger import Ledger
from medfl.client.premises import Enrolment, Home
from medfl.common import coordination, heads
from medfl.common.audit import Head
from medfl.common.coordination import HeadSeen, ShowHead
from medfl.common.errors import FederationError, PolicyRefused
from medfl.common.kept import load_record, save_record
from medfl.common.private_files import private_folder
from medfl.common.signing import new_key, public_of
from medfl.server import authority
from medfl.server import heads as theirs
from medfl.server.federation import Federation, SiteRecord
from medfl.server.settings import ServerSettings, open_federation


@dataclass
class Direct:
    """A line without a wire: what is said is what would be sent."""

    federation: Federation
    site: SiteRecord
    change: Callable[[HeadSeen], HeadSeen] = lambda answer: answer

    def __post_init__(self) -> None:
        self.said: list[bytes] = []

    def call(self, method: str, message: object, answer: type[HeadSeen]) -> HeadSeen:
        self.said.append(coordination.encode(message))
        shown = coordination.decode(self.said[-1], ShowHead)
        return self.change(theirs.exchange(self.federation, self.site, shown))


@dataclass
class World:
    home: Home
    ledger: Ledger
    line: Direct

    def exchange(self) -> None:
        witness.exchange(self.home, self.line, self.ledger)  # type: ignore[arg-type]

    def spend(self, study: str = "s1") -> None:
        charge = Charge(study, f"study-{study}", "main", "training", 1, 4.0, 0.5, 5)
        self.ledger.settle(self.ledger.reserve(charge, ["a", "b"]))

    def copies(self, *folders: Path) -> Callable[[], None]:
        """Back these folders up; the answer puts them back."""
        made = [(f, f.with_name(f.name + ".backup")) for f in folders]
        for folder, backup in made:
            shutil.copytree(folder, backup)

        def put_back() -> None:
            for folder, backup in made:
                shutil.rmtree(folder)
                shutil.copytree(backup, folder)

        return put_back

    def whats(self) -> list[str]:
        return [line["what"] for line in self.line.federation.audit.lines()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    settings = ServerSettings(name="T", listen="127.0.0.1:0", workers=1)
    authority.init(tmp_path / "fed", settings, 0.0)
    federation = open_federation(tmp_path / "fed")
    home = Home(private_folder(tmp_path / "north"))
    public = public_of(new_key(home.signing_file))
    coordinator = public_of(federation.signing_key())
    save_record(home.enrolment_file, Enrolment("north", "h:1", "T", coordinator, 0))
    home.record("enrolled")
    record = SiteRecord("north", "active", "", 0.0, public, 0)
    return World(home, Ledger(tmp_path / "ledger"), Direct(federation, record))


def test_a_ledger_that_grows_is_shown_and_countersigned(world: World) -> None:
    world.exchange()
    assert json.loads(world.line.said[-1])["ledger"] is None
    for n in (1, 2, 3):
        world.spend()
        world.exchange()
        assert json.loads(world.line.said[-1])["ledger"]["n"] == n
    witness.refuse_other_ledger(world.home, world.ledger)
    kept = load_record(world.home.folder / "ledger_countersigned.json", heads.Witness)
    assert kept is not None
    assert (kept.of, kept.by, kept.n) == ("ledger:north", "coordinator:T", 3)


def test_what_is_shown_does_not_tell_whether_the_hospital_spent_anything(world: World) -> None:
    world.spend()
    words = []
    for used_elsewhere in (False, True, False):
        if used_elsewhere:
            world.spend("of-another-federation")
        world.exchange()
        words.append(json.loads(world.line.said[-1])["ledger"])
    assert [w["n"] for w in words] == [1, 2, 3]
    assert len({w["hash"] for w in words}) == 3
    text = (world.ledger.folder / "ledger.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert not any(line["hash"].encode() in said for line in lines for said in world.line.said)


def test_a_ledger_put_back_deleted_or_cut_stops_training_at_the_hospital(world: World) -> None:
    world.spend()
    early = world.copies(world.ledger.folder)
    world.spend()
    world.exchange()
    file = world.ledger.folder / "ledger.jsonl"
    whole = file.read_bytes()

    def cut() -> None:
        file.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))

    for harm in (early, cut, lambda: shutil.rmtree(world.ledger.folder), world.spend):
        # The last one spends on the ledger begun anew: as many lines as before help nobody.
        harm()
        with pytest.raises(PolicyRefused, match="Restore its latest copy"):
            witness.refuse_other_ledger(world.home, world.ledger)
        with pytest.raises(PolicyRefused, match="Restore its latest copy"):
            world.exchange()
    other = replace(world, ledger=Ledger(world.ledger.folder.with_name("elsewhere")))
    other.spend()
    with pytest.raises(PolicyRefused, match="names another one"):
        other.exchange()


def test_both_folders_put_back_together_are_noticed_by_the_coordinator(world: World) -> None:
    world.spend()
    world.exchange()
    put_back = world.copies(world.ledger.folder, world.home.folder)
    world.spend()
    world.exchange()
    world.exchange()
    put_back()
    # The audit log alone would tell; here it is as if it had grown since.
    for _ in range(9):
        world.home.record("something")
    witness.refuse_other_ledger(world.home, world.ledger)
    with pytest.raises(PolicyRefused, match="was shown here 3 times, and its folders remember 1"):
        world.exchange()
    assert world.whats()[-1] == "ledger of a site was rolled back"
    (world.home.folder / "ledger_shown.json").unlink()
    shutil.rmtree(world.ledger.folder)
    with pytest.raises(PolicyRefused, match="its folders remember 0"):
        world.exchange()


def test_an_answer_that_was_lost_costs_a_number_and_nothing_else(world: World) -> None:
    world.spend()

    def lost(answer: HeadSeen) -> HeadSeen:
        raise FederationError("no answer in time")

    world.line.change = lost
    with pytest.raises(FederationError, match="no answer"):
        world.exchange()
    world.spend()
    world.line.change = lambda answer: answer
    world.exchange()
    assert json.loads(world.line.said[-1])["ledger"]["n"] == 2


def test_a_site_that_enrolled_again_begins_anew(world: World) -> None:
    world.spend()
    world.exchange()
    old = world.home
    world.home = Home(private_folder(old.folder.with_name("again")))
    public = public_of(new_key(world.home.signing_file))
    save_record(world.home.enrolment_file, old.enrolment())
    world.home.record("enrolled")
    shutil.rmtree(world.ledger.folder)
    with pytest.raises(PolicyRefused, match="not signed by the key pinned"):
        world.exchange()
    world.line.site = replace(world.line.site, signing_key=public)
    world.spend()
    world.exchange()


def test_a_countersignature_under_another_ledger_is_not_kept(world: World) -> None:
    world.spend()
    mine = world.home.signing_key()

    def resigned(seen: heads.Witness) -> heads.Witness:
        return heads.witness(mine, seen.of, seen.by, Head(seen.n, seen.hash), seen.at)

    for change in (
        lambda a: replace(a, ledger=None),
        lambda a: replace(a, ledger=a.seen),
        lambda a: replace(a, ledger=resigned(a.ledger)),
        lambda a: replace(a, ledger=replace(a.ledger, n=a.ledger.n + 1)),
    ):
        world.line.change = change
        with pytest.raises(FederationError, match="is not right"):
            world.exchange()
    assert not (world.home.folder / "ledger_countersigned.json").exists()
    forged = ShowHead(
        own=heads.witness(mine, "north", "north", world.home.audit.head(), 1.0),
        ledger=heads.witness(mine, "ledger:south", "north", Head(9, "aa"), 1.0),
    )
    with pytest.raises(PolicyRefused, match="another site's"):
        theirs.exchange(world.line.federation, world.line.site, forged)
