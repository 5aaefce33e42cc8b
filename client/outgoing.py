"""What leaves the hospital of an update, and what stays here until the next one."""

from __future__ import annotations

from pathlib import Path

from medfl.common import tensors
from medfl.common.packing import Kind, pack, pack_exactly, pack_with_feedback
from medfl.common.tensors import Array, Tensors, all_finite


def outgoing(folder: Path, round_: int, delta: Tensors, kind: Kind) -> Tensors:
    """The update as it travels; with int8, what rounding takes away is kept in `folder`.

    The kept part belongs to its round: asked for the same round again, this site sends the same.
    """
    if kind == "float32":
        return pack_exactly(delta)
    if kind == "float16":
        return pack(delta, kind)
    packed, residual = pack_with_feedback(delta, _residual_before(folder, round_), kind)
    if all_finite(residual):  # else the update is refused, and later ones must not suffer for it
        _save(folder, round_, residual)
    return packed


def _residual_before(folder: Path, round_: int) -> dict[str, Array]:
    files = [f for f in _files(folder) if f < _file(folder, round_)]
    return tensors.load(files[-1]) if files else {}


def _save(folder: Path, round_: int, residual: Tensors) -> None:
    """Keep the residual of this round and of the last one before it."""
    before = [f for f in _files(folder) if f < _file(folder, round_)]
    for file in _files(folder):
        if file not in before[-1:]:
            file.unlink()
    tensors.save(residual, _file(folder, round_))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("residual_*.safetensors"))


def _file(folder: Path, round_: int) -> Path:
    return folder / f"residual_{round_:05d}.safetensors"
