"""When training ends before all rounds of the study: by its rule, or because a person asked.

The rule is the criterion UP of Prechelt 1998 ("Early stopping: but when?") against the best model
instead of the one before: so many judged models in a row that are no better. Each round judges the
model that it receives, so the rule is one round behind: the last round's model is judged after the
end, and may be the best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from medfl.common.study import Federation
from medfl.server.records import Best

Why = Literal["", "no better", "asked"]


@dataclass(frozen=True, slots=True)
class Ending:
    """after: rounds that were trained. why: what ended them early; "" after all of them."""

    after: int
    why: Why = ""


def reason(how: Federation, best: Best, asked: Callable[[], bool]) -> Why:
    """Why no further round is trained; "" where one is.

    best: with `no_better`, the models in a row that were compared with it and are no better.
    asked: whether a person wants the end.
    """
    if how.patience is not None and best.no_better >= how.patience:
        return "no better"
    return "asked" if asked() else ""


def sentence(ending: Ending, how: Federation) -> str:
    """What people are told; "" where all rounds were trained."""
    if not ending.why:
        return ""
    where = f"training ended after round {ending.after} of {how.rounds}"
    if ending.why == "asked":
        return f"{where}, because a person of the coordinator asked for its end"
    models = f"{how.patience} models in a row" if how.patience != 1 else "one model"
    return f"{where}: {models} had no better {how.best_metric} on validation cases (patience)"


def ended_early(ending: Ending | None, how: Federation) -> dict[str, Any]:
    """For result.json: `ended_after`, in rounds, and `ending` in words; nothing after all."""
    if ending is None or not ending.why:
        return {}
    return {"ended_after": ending.after, "ending": sentence(ending, how)}
