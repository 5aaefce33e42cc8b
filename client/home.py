"""What stays at the hospital between rounds: layers of its own, its control variate, its bound.

Layers are kept as of the rounds in which this site trained: those of the best round, because the
study may publish that model, and the latest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medfl.client.by_round import ByRound
from medfl.common.errors import FederationError
from medfl.common.private_files import private_folder, write_private
from medfl.common.tensors import Array, Tensors


def begin_run(folder: Path, run: str) -> None:
    """Where this is another run than the last of the study, drop what that one left.

    folder: of the site's work for the study. Control variates and layers kept at home belong to a
    run; the privacy that was spent does not: it stands in the hospital's ledger, which counts all
    runs of a study together.
    """
    file = folder / "run"
    last = file.read_text(encoding="utf-8") if file.exists() else ""
    if run == last:
        return
    for left in (folder / "state").glob("*.safetensors"):
        left.unlink()
    private_folder(folder)
    write_private(file, run.encode())


def layers(folder: Path) -> ByRound:
    """This site's own layers, below its `folder` of state."""
    return ByRound(folder, "home")


def control(folder: Path) -> ByRound:
    """This site's control variate (SCAFFOLD), below its `folder` of state."""
    return ByRound(folder, "control")


def bound(folder: Path) -> ByRound:
    """This site's clipping bound where it follows a quantile, below its `folder` of state."""
    return ByRound(folder, "bound")


def control_before(folder: Path, round_: int, asked: Tensors) -> dict[str, Array]:
    """This site's control variate before `round_`; zeros before its first training.

    Raises:
        FederationError: the coordinator sent none of its own.
    """
    if not asked:
        raise FederationError("The strategy needs a control variate and the coordinator sent none.")
    return control(folder).as_of(round_ - 1) or {n: np.zeros_like(a) for n, a in asked.items()}


def control_change(
    own: Tensors, server: Tensors, delta: Tensors, rate_sum: float
) -> dict[str, Array]:
    """c_i+ - c_i = -c + (x - y_i) / (K eta): Karimireddy et al. 2020, Algorithm 1, option II.

    rate_sum: K eta, the sum of the learning rates of this round's steps.
    """
    scale = 1.0 / max(rate_sum, 1e-12)
    return {n: (-server[n] - scale * delta[n]).astype(np.float32) for n in own}
