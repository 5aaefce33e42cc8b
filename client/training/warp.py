"""Geometry of image batches, in voxels: matrices, sampling grids and blurring."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def matrices(angles: Tensor, factors: Tensor, slants: Tensor) -> Tensor:
    """(B, D, D) from output to input offsets around the centre.

    angles: radians, (B, 1) in 2-D, (B, 3) in 3-D, about each axis. factors: (B, D) enlargement.
    slants: (B, D, D) shear; its diagonal is ignored.
    """
    n, dimensions = factors.shape
    planes = [(0, 1)] if dimensions == 2 else [(1, 2), (0, 2), (0, 1)]
    matrix = torch.diag_embed(1 / factors)
    off_diagonal = 1 - torch.eye(dimensions)
    matrix = matrix @ (torch.eye(dimensions) + slants * off_diagonal)
    for number, (a, b) in enumerate(planes):
        turn = torch.eye(dimensions).repeat(n, 1, 1)
        cosine, sine = angles[:, number].cos(), angles[:, number].sin()
        turn[:, a, a], turn[:, a, b], turn[:, b, a], turn[:, b, b] = cosine, -sine, sine, cosine
        matrix = matrix @ turn
    return matrix


def affine_grid(matrix: Tensor, shifts: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, *size, D) input voxel for every output voxel: matrix · (voxel - centre) + centre - shift.

    matrix: (B, D, D). shifts: (B, D) in voxels.
    """
    centre = torch.tensor([(side - 1) / 2 for side in size])
    offsets = _voxels(size) - centre
    moved = torch.einsum("bij,...j->b...i", matrix, offsets)
    spread = (len(matrix), *(1,) * len(size), len(size))
    return moved + centre - shifts.reshape(spread)


def bent_grid(moves: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, *size, D) input voxel for every output voxel, from moves (B, D, *points) in voxels."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    smooth = functional.interpolate(moves, size=size, mode=mode, align_corners=True)
    return _voxels(size) + smooth.movedim(1, -1)


def sample(images: Tensor, masks: Tensor | None, grid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images (B, C, *spatial) linearly and masks (B, *spatial) by the nearest voxel at `grid`.

    Outside the image its border is repeated.
    """
    sides = torch.tensor(images.shape[2:], device=grid.device)
    # grid_sample wants -1..1 from the first to the last voxel's centre, last axis first.
    places = (2 * grid / (sides - 1).clamp_min(1) - 1).flip(-1)
    moved = functional.grid_sample(
        images, places, mode="bilinear", padding_mode="border", align_corners=True
    )
    if masks is None:
        return moved, None
    picked = functional.grid_sample(
        masks[:, None].float(), places, mode="nearest", padding_mode="border", align_corners=True
    )
    return moved, picked[:, 0].to(masks.dtype)


def blur(images: Tensor, sds: Tensor, largest: float) -> Tensor:
    """Gaussian blur with (B,) standard deviations in voxels, one axis after the other.

    largest: no record's is larger; kernels reach by it, and not by whoever is in the batch.
    """
    reach = max(1, int(3 * largest + 0.5))
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernels = torch.exp(-((offsets / sds[:, None]) ** 2) / 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    for axis in range(2, images.ndim):
        lines = images.movedim(axis, -1)
        flat = lines.reshape(len(images), -1, lines.shape[-1]).transpose(0, 1)
        edge = functional.pad(flat, (reach, reach), mode="replicate")
        # One group a record, so that each has its own kernel.
        out = functional.conv1d(edge, kernels[:, None], groups=len(images))
        images = out.transpose(0, 1).reshape(lines.shape).movedim(-1, axis)
    return images


def _voxels(size: tuple[int, ...]) -> Tensor:
    axes = [torch.arange(side, dtype=torch.float32) for side in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
