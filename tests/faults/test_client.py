"""Cases 16 to 19 and 23 to 25: what can happen to a hospital while others go on.

Two hospitals; the trainer of one meets its fate at the moment that a case writes down.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness.processes import until
from harness.world import World, federation_of, seconds

UNLUCKY = "south"
Seen = Callable[[str], None]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("client")
    spoils = {UNLUCKY: {"trainer": {"fate": str(folder / "fate.json")}}}
    made = federation_of(folder / "world", ("north", UNLUCKY), {"rounds": 3}, spoils)
    warm = made.run()
    made.ends(warm)
    yield made
    made.close()


@pytest.fixture
def fate(shared: World) -> Callable[..., None]:
    """fate(do, at="train", ...): what the unlucky hospital's next training meets."""

    def write(do: str, at: str = "train", **more: Any) -> None:
        file = shared.folder.parent / "fate.json"
        file.write_text(json.dumps({"at": at, "do": do, **more}))

    return write


def met(world: World) -> bool:
    return not (world.folder.parent / "fate.json").exists()


@pytest.mark.parametrize(
    ("do", "why"),
    [
        pytest.param("segfault", "training process ended", marks=pytest.mark.case(18, "SIGSEGV")),
        pytest.param(
            "killed",
            "training process ended",
            marks=pytest.mark.case(18, "SIGKILL, as by the kernel's OOM killer"),
        ),
        pytest.param(
            "memory",
            "out of memory",
            marks=pytest.mark.case(18, "8 GiB asked for under RLIMIT_AS"),
        ),
        pytest.param(
            "gpu",
            "GPU failed",
            marks=pytest.mark.case(
                19,
                "torch.AcceleratorError in training",
                short="no GPU was lost here: torch's error is raised by hand",
            ),
        ),
    ],
)
def test_a_failed_training_is_told_in_seconds_and_costs_one_round(
    shared: World, fate: Any, seen: Seen, do: str, why: str
) -> None:
    fate(do)
    run = shared.run(deadline=60)
    shared.ends(run)
    first, *others = shared.rounds(run)
    assert first["left_out"] == {UNLUCKY: why}
    assert [r["left_out"] for r in others] == [{}] * len(others)
    assert first["seconds"] < 30
    seen(f"{why!r} after {first['seconds']:.1f} s; in the next round again")


@pytest.mark.case(19, 'site.toml with device = "cuda" where no GPU can be used')
def test_a_hospital_that_asks_for_a_gpu_never_trains_without(shared: World, seen: Seen) -> None:
    site = shared.sites[UNLUCKY]
    text = site.site_file.read_text()
    digest = shared.publish("gpu", rounds=1)
    for one in shared.sites.values():
        one.approve("gpu")
    site.site_file.write_text(text.replace("[data]", 'device = "cuda"\n[data]'))
    try:
        run = shared.run("gpu")
        shared.ends(run)
    finally:
        site.site_file.write_text(text)
    assert shared.state_of(run).digest == digest
    assert all(UNLUCKY not in str(r["sites"]) for r in shared.rounds(run))
    log = site.trainer_log()
    assert "site.toml asks for a GPU and none can be used" in log
    seen("refused by its policy in `prepare`, no round trained there; the reason is in its log")


@pytest.mark.case(
    24,
    "training 10 s longer than a deadline of 4 s",
    short="that the answer came afterwards is not in the coordinator's log",
)
def test_a_late_answer_does_not_count(shared: World, fate: Any, seen: Seen) -> None:
    fate("sleep", seconds=10)
    since = time.monotonic()
    run = shared.run(deadline=4)
    over = shared.over(run)
    assert over.state == "done"
    records = shared.rounds(run)
    assert records[0]["left_out"] == {UNLUCKY: "late"}
    assert records[0]["seconds"] < 9
    answered = until(
        lambda: [
            e
            for e in shared.sites[UNLUCKY].audit()
            if e["what"] == "answered"
            and e["about"]["run"] == run
            and (e["about"]["kind"], e["about"]["round"]) == ("round", 1)
        ],
        30,
        "the late answer",
    )
    noted = [e for e in shared.audit() if e["what"] == "round" and e["about"]["run"] == run]
    assert noted[0]["about"]["left_out"] == [f"{UNLUCKY}: late"]
    assert answered
    seen(
        f"round over after {records[0]['seconds']:.1f} s without it, in the coordinator's log as "
        f"late; the hospital's log has the answer it gave ({seconds(since)} in all)"
    )


@pytest.mark.case(23, "the state folder copied, a second medfl-client started with it")
def test_a_second_client_with_the_same_keys_is_refused(shared: World, seen: Seen) -> None:
    site = shared.sites[UNLUCKY]
    copy = site.home / "copy"
    shutil.copytree(site.state, copy, ignore=shutil.ignore_patterns("node", "*.lock"))
    options = ("--state", str(copy), "--site", str(site.site_file))
    second = shared.start("client", "start", *options)
    second.wait_for("is running with the same keys", 60)
    run = shared.run()
    shared.ends(run)
    assert shared.left_out(run) == [{}] * 4
    assert second.term() == 0
    whats = [e["what"] for e in shared.audit()]
    assert "second session refused" in whats
    assert "Connected" not in second.said
    seen("told so and kept waiting, noted by the coordinator; the first went on in all rounds")


@pytest.mark.timeout(800)
@pytest.mark.case(16, "SIGKILL of the whole client while it trains, deadline 8 s")
@pytest.mark.case(17, "the same client started again at once")
def test_a_killed_client_costs_a_round_and_comes_back(shared: World, fate: Any, seen: Seen) -> None:
    site = shared.sites[UNLUCKY]
    fate("sleep", seconds=60)
    run = shared.run(deadline=8)
    until(lambda: met(shared), 120, "the training")
    assert site.process is not None
    site.process.kill()
    since, line = time.monotonic(), len(shared.server.lines) if shared.server else 0
    spoils = {"trainer": {"fate": str(shared.folder.parent / "fate.json")}}
    again = site.start(**spoils)
    back = time.monotonic() - since
    shared.ends(run)
    records = [r for r in shared.rounds(run) if UNLUCKY in r["left_out"]]
    assert records
    assert all([s["name"] for s in r["sites"]] == ["north"] for r in records[:1])
    shared.connected(UNLUCKY, since=line)
    assert again.popen.poll() is None
    after = shared.run()
    shared.ends(after)
    assert shared.left_out(after) == [{}] * 4
    seen(
        f"run ended without it in {len(records)} of {len(shared.rounds(run))} exchanges "
        f"({records[0]['left_out'][UNLUCKY]}); started again at once it was connected after "
        f"{back:.0f} s, and counted in the next run"
    )


@pytest.mark.case(25, "`medfl-client withdraw` while round 1 of 3 is trained")
def test_a_withdrawal_holds_in_the_next_round(shared: World, fate: Any, seen: Seen) -> None:
    site = shared.sites[UNLUCKY]
    shared.publish("leave", rounds=3)
    for one in shared.sites.values():
        one.approve("leave")
    fate("sleep", seconds=6)
    run = shared.run("leave")
    until(lambda: met(shared), 120, "the training")
    assert site.done("withdraw", "leave", "--state", str(site.state)).returncode == 0
    shared.ends(run)
    records = shared.rounds(run)
    assert all(UNLUCKY in r["left_out"] for r in records[1:])
    assert all([s["name"] for s in r["sites"]] == ["north"] for r in records[1:])
    patients = [f"p{k}" for k in range(6)]
    traced = [site.done("lineage", str(site.site_file), p, "--json").stdout for p in patients]
    used = [u for text in traced for u in json.loads(text)]
    assert {u["round"] for u in used if u["study"] == shared.state_of(run).digest} == {1}
    seen(
        f"weight 0 from round 2 on ({records[1]['left_out'][UNLUCKY]}); lineage names round 1 only"
    )
