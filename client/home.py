"""What stays at the hospital between rounds: layers of its own, and its control variate.

Layers are kept as of the rounds in which this site trained: those of the best round, because the
study may publish that model, and the latest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medfl.common import tensors
from medfl.common.errors import FederationError
from medfl.common.tensors import Array, Tensors


def save_layers(folder: Path, round_: int, layers: Tensors, best_round: int) -> None:
    """Keep this site's layers as of the end of `round_`, and drop those that nobody needs."""
    keep = {_layers_as_of(folder, best_round), _layers_as_of(folder, round_ - 1)}
    for file in folder.glob("home_*.safetensors"):
        if file not in keep:
            file.unlink()
    tensors.save(layers, _layers_file(folder, round_))


def load_layers(folder: Path, round_: int) -> dict[str, Array]:
    """This site's layers as of the end of `round_`; none before its first training.

    A site that was not drawn in that round has them from the last one before in which it was.
    """
    file = _layers_as_of(folder, round_)
    return {} if file is None else tensors.load(file)


def load_control(folder: Path, asked: Tensors) -> dict[str, Array]:
    """This site's control variate; zeros before its first round.

    Raises:
        FederationError: the coordinator sent none of its own.
    """
    if not asked:
        raise FederationError("The strategy needs a control variate and the coordinator sent none.")
    file = folder / "control.safetensors"
    return tensors.load(file) if file.exists() else {n: np.zeros_like(a) for n, a in asked.items()}


def save_control(folder: Path, control: Tensors) -> None:
    """Keep this site's control variate for its next round."""
    tensors.save(control, folder / "control.safetensors")


def control_change(
    own: Tensors, server: Tensors, delta: Tensors, rate_sum: float
) -> dict[str, Array]:
    """c_i+ - c_i = -c + (x - y_i) / (K eta): Karimireddy et al. 2020, Algorithm 1, option II.

    rate_sum: K eta, the sum of the learning rates of this round's steps.
    """
    scale = 1.0 / max(rate_sum, 1e-12)
    return {n: (-server[n] - scale * delta[n]).astype(np.float32) for n in own}


def _layers_file(folder: Path, round_: int) -> Path:
    return folder / f"home_{round_:05d}.safetensors"


def _layers_as_of(folder: Path, round_: int) -> Path | None:
    files = sorted(folder.glob("home_*.safetensors"))
    return max((f for f in files if f <= _layers_file(folder, round_)), default=None)
