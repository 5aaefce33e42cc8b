"""Case 9: a hospital's line is away for six minutes while a run goes on and ends."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from harness.world import World, seconds

CUT = "south"
Seen = Callable[[str], None]


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.case(9, "connections reset and refused for 360 s, deadline 15 s")
def test_a_long_cut_costs_its_rounds_and_the_hospital_comes_back(
    federation: Callable[..., World], seen: Seen
) -> None:
    world = federation(study={"rounds": 8})
    proxy = world.sites[CUT].proxy
    run = world.run(deadline=15)
    world.reached(run, 1)
    since = time.monotonic()
    proxy.cut()
    over = world.over(run, 200)
    records = world.rounds(run)
    time.sleep(max(0.0, 360 - (time.monotonic() - since)))
    proxy.mend()
    back = time.monotonic()
    assert over.state == "done", over
    missing = [r["left_out"][CUT] for r in records if CUT in r["left_out"]]
    assert missing
    assert all([s["name"] for s in r["sites"]] == ["north"] for r in records if r["left_out"])
    assert "not connected" in str(missing) or "late" in str(missing)
    after = world.run(deadline=100)
    world.ends(after)
    assert world.left_out(after) == [{}] * 9
    seen(
        f"left out of {len(missing)} exchanges ({missing[0]}), none longer than "
        f"{max(r['seconds'] for r in records):.0f} s; 360 s later counted again in a run of "
        f"{seconds(back)}"
    )
