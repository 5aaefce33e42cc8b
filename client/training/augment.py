"""Random changes of training images, a whole batch at a time.

Every record draws its own numbers, and nothing of it depends on the others. A batch is changed in
one tensor operation: per-record transforms of the usual libraries take longer than the training
step of a small network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medfl.client.training import warp
from medfl.client.training.draws import Draws
from medfl.common.errors import ConfigError
from medfl.common.options import checked_options
from medfl.common.study import Augmentation, Study

Pair = tuple[Tensor, Tensor | None]
Change = Callable[..., Pair]


@dataclass(frozen=True, slots=True)
class Step:
    """One transform of the study with its checked options."""

    change: Change
    probability: float
    options: dict[str, Any]


def augmentations(study: Study) -> tuple[Step, ...]:
    """The study's transforms, ready to use.

    Raises:
        ConfigError: unknown transform or option, all faults at once.
    """
    steps, faults = [], []
    for number, written in enumerate(study.training.augment or []):
        try:
            steps.append(_step(written, f"training.augment.{number}"))
        except ConfigError as error:
            faults += error.faults
    if steps and study.image is None:
        faults.append("training.augment: serves images only; remove it from a record study")
    if faults:
        raise ConfigError(faults)
    return tuple(steps)


def augment(
    steps: tuple[Step, ...], images: Tensor, targets: Tensor, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Apply the steps in order; each record takes part in each with the step's probability.

    images: (B, C, *spatial). targets: masks (B, *spatial) move with their images; anything else
    stays as it is. Arguments are left untouched.
    """
    moves = targets.ndim == images.ndim - 1 and targets.ndim > 2
    for number, step in enumerate(steps):
        drawn = draws.of(f"{number} whether").uniform() < step.probability
        chosen = drawn.nonzero()[:, 0].to(images.device)
        if not len(chosen):
            continue
        masks = targets[chosen] if moves else None
        changed, masks = step.change(
            images[chosen], masks, draws.of(f"{number}", chosen), **step.options
        )
        images = images.index_copy(0, chosen, changed)
        if masks is not None:
            targets = targets.index_copy(0, chosen, masks)
    return images, targets


def flip(images: Tensor, masks: Tensor | None, draws: Draws, *, axes: tuple[int, ...] = ()) -> Pair:
    """Mirror along one random axis of `axes` (0 = first spatial axis; omitted: any)."""
    choices = axes or tuple(range(images.ndim - 2))
    picks = draws.whole(len(choices))
    for pick, axis in enumerate(choices):
        rows = (picks == pick).nonzero()[:, 0].to(images.device)
        images = images.index_copy(0, rows, images[rows].flip(2 + axis))
        if masks is not None:
            masks = masks.index_copy(0, rows, masks[rows].flip(1 + axis))
    return images, masks


def rotate90(images: Tensor, masks: Tensor | None, draws: Draws) -> Pair:
    """Turn by 90, 180 or 270 degrees in the plane of the first two axes; 180 if sides differ."""
    square = images.shape[2] == images.shape[3]
    turns = 1 + draws.whole(3) if square else torch.full((len(images),), 2)
    for turn in (1, 2, 3) if square else (2,):
        rows = (turns == turn).nonzero()[:, 0].to(images.device)
        images = images.index_copy(0, rows, torch.rot90(images[rows], turn, (2, 3)))
        if masks is not None:
            masks = masks.index_copy(0, rows, torch.rot90(masks[rows], turn, (1, 2)))
    return images, masks


def rotate(images: Tensor, masks: Tensor | None, draws: Draws, *, degrees: float = 15.0) -> Pair:
    """Turn by up to `degrees` either way; volumes about each of their axes."""
    return affine(images, masks, draws, degrees=degrees, scale=0.0, translate=0.0, shear=0.0)


def zoom(images: Tensor, masks: Tensor | None, draws: Draws, *, scale: float = 0.1) -> Pair:
    """Enlarge or shrink by a factor from 1 - scale to 1 + scale."""
    return affine(images, masks, draws, degrees=0.0, scale=scale, translate=0.0, shear=0.0)


def affine(
    images: Tensor,
    masks: Tensor | None,
    draws: Draws,
    *,
    degrees: float = 15.0,
    scale: float = 0.1,
    translate: float = 0.05,
    shear: float = 0.0,
) -> Pair:
    """Turn, scale, shear and move; `translate` is a share of each side."""
    size = tuple(images.shape[2:])
    n, dimensions = len(images), len(size)
    angles = _around(draws, degrees, 1 if dimensions == 2 else 3) * torch.pi / 180
    factors = 1 + _around(draws, scale, 1).expand(n, dimensions)
    slants = _around(draws, shear, dimensions, dimensions)
    shifts = _around(draws, translate, dimensions) * torch.tensor(size)
    matrices = warp.matrices(angles, factors, slants)
    grid = warp.affine_grid(matrices, shifts, size)
    return warp.sample(images, masks, grid.to(images.device))


def elastic(
    images: Tensor,
    masks: Tensor | None,
    draws: Draws,
    *,
    spacing: int = 16,
    magnitude: float = 2.0,
) -> Pair:
    """Bend smoothly: random moves of up to `magnitude` voxels at points `spacing` voxels apart."""
    size = tuple(images.shape[2:])
    points = tuple(max(2, side // spacing + 1) for side in size)
    moves = _around(draws, magnitude, len(size), *points)
    return warp.sample(images, masks, warp.bent_grid(moves, size).to(images.device))


def gaussian_noise(images: Tensor, masks: Tensor | None, draws: Draws, *, sd: float = 0.1) -> Pair:
    """Add noise with a standard deviation drawn from 0 to `sd`."""
    sds = _fit(draws.uniform() * sd, images)
    noise = draws.normal(*images.shape[1:]).to(images.device)
    return images + sds * noise, masks


def gaussian_smooth(
    images: Tensor,
    masks: Tensor | None,
    draws: Draws,
    *,
    low: float = 0.5,
    high: float = 1.0,
) -> Pair:
    """Blur with a standard deviation from `low` to `high` voxels."""
    sds = low + draws.uniform() * (high - low)
    return warp.blur(images, sds.to(images.device), max(low, high)), masks


def intensity_shift(images: Tensor, masks: Tensor | None, draws: Draws, *, by: float = 0.1) -> Pair:
    """Add one number from -by to by to the whole image."""
    return images + _fit(_around(draws, by), images), masks


def intensity_scale(images: Tensor, masks: Tensor | None, draws: Draws, *, by: float = 0.1) -> Pair:
    """Multiply the whole image by one number from 1 - by to 1 + by."""
    return images * _fit(1 + _around(draws, by), images), masks


def contrast(
    images: Tensor,
    masks: Tensor | None,
    draws: Draws,
    *,
    low: float = 0.7,
    high: float = 1.5,
) -> Pair:
    """Raise to a power (gamma) from `low` to `high` between each image's own extremes."""
    powers = _fit(low + draws.uniform() * (high - low), images)
    lowest, highest = _extremes(images)
    span = (highest - lowest).clamp_min(1e-8)
    return ((images - lowest) / span) ** powers * span + lowest, masks


def invert(images: Tensor, masks: Tensor | None, draws: Draws) -> Pair:
    """Turn bright into dark between each image's own extremes (microscopy of either kind)."""
    lowest, highest = _extremes(images)
    return highest + lowest - images, masks


AUGMENTATIONS: dict[str, Change] = {
    "flip": flip,
    "rotate90": rotate90,
    "rotate": rotate,
    "zoom": zoom,
    "affine": affine,
    "elastic": elastic,
    "gaussian_noise": gaussian_noise,
    "gaussian_smooth": gaussian_smooth,
    "intensity_shift": intensity_shift,
    "intensity_scale": intensity_scale,
    "contrast": contrast,
    "invert": invert,
}


def _step(written: Augmentation, where: str) -> Step:
    change = AUGMENTATIONS.get(written.name)
    if change is None:
        raise ConfigError(
            f"{where}.name: there is no augmentation {written.name!r}; "
            f"use one of {', '.join(AUGMENTATIONS)}"
        )
    options = checked_options(change, written.options, f"{where}.options")
    return Step(change, float(written.probability), options)


def _around(draws: Draws, most: float, *shape: int) -> Tensor:
    """(B, *shape) uniform numbers from -most to most."""
    return (2 * draws.uniform(*shape) - 1) * most


def _fit(numbers: Tensor, images: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) on the images' device."""
    return numbers.to(images.device).reshape(-1, *(1,) * (images.ndim - 1))


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    flat = images.flatten(1)
    return _fit(flat.amin(dim=1), images), _fit(flat.amax(dim=1), images)
