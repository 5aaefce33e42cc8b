"""What leaves the hospital of an update, and what stays here until the next one."""

from __future__ import annotations

from pathlib import Path

from medfl.client.by_round import ByRound
from medfl.common.packing import WITH_FEEDBACK, Kind, pack, pack_exactly, pack_with_feedback
from medfl.common.tensors import Tensors, all_finite


def outgoing(folder: Path, round_: int, delta: Tensors, kind: Kind) -> Tensors:
    """The update as it travels; of int8 and int4, what rounding takes away is kept in `folder`.

    The kept part belongs to its round: asked for the same round again, this site sends the same.
    """
    if kind == "float32":
        return pack_exactly(delta)
    if kind not in WITH_FEEDBACK:
        return pack(delta, kind)
    residuals = ByRound(folder, "residual")
    packed, residual = pack_with_feedback(delta, residuals.as_of(round_ - 1), kind)
    if all_finite(residual):  # else the update is refused, and later ones must not suffer for it
        residuals.save(round_, residual)
    return packed
