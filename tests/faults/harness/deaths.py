"""Exact moments at which a coordinator can be killed: each replaces one function of medfl's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def _before_round(number: int, now: Callable[[], None]) -> None:
    """Nothing of the round has been asked yet."""
    from medfl.server import rounds

    true = rounds._round

    def spoilt(federation: Any, model: Any, round_: int) -> Any:
        if round_ == number:
            now()
        return true(federation, model, round_)

    rounds._round = spoilt


def _mid_round(number: int, now: Callable[[], None]) -> None:
    """All hospitals were asked, and the first answer has been admitted."""
    from medfl.server import rounds

    true = rounds._ask

    def spoilt(federation: Any, roster: Any, asked: Any) -> Any:
        for reply in true(federation, roster, asked):
            if asked.kind == "round" and asked.round == number:
                now()
            yield reply

    rounds._ask = spoilt


def _after_aggregation(number: int, now: Callable[[], None]) -> None:
    """The new model is there, its checkpoint not."""
    from medfl.server import checkpoint

    true = checkpoint.Checkpoints.keep

    def spoilt(self: Any, made: Any) -> None:
        if made.record.round == number:
            now()
        true(self, made)

    checkpoint.Checkpoints.keep = spoilt


def _in_checkpoint(number: int, now: Callable[[], None]) -> None:
    """Half of the checkpoint's bytes are written."""
    from medfl.common import tensors

    true = tensors.write_atomic

    def spoilt(path: Path, content: Any) -> None:
        if path.name == f"checkpoint-{number:05d}.safetensors":
            raw = content if isinstance(content, bytes) else b"".join(content)

            def halves() -> Any:
                yield raw[: len(raw) // 2]
                now()
                yield raw[len(raw) // 2 :]

            true(path, halves())
        else:
            true(path, content)

    tensors.write_atomic = spoilt


def _after_checkpoint(number: int, now: Callable[[], None]) -> None:
    """The checkpoint is there, and nothing has been told of the round."""
    from medfl.server import checkpoint

    true = checkpoint.Checkpoints.keep

    def spoilt(self: Any, made: Any) -> None:
        true(self, made)
        if made.record.round == number:
            now()

    checkpoint.Checkpoints.keep = spoilt


DEATHS: dict[str, Callable[[int, Callable[[], None]], None]] = {
    "before round": _before_round,
    "mid-round": _mid_round,
    "after aggregation": _after_aggregation,
    "in checkpoint": _in_checkpoint,
    "after checkpoint": _after_checkpoint,
}
