"""Losses: the mean over records of a loss of each record alone.

No record's loss depends on another record of the batch, which per-record gradients (differential
privacy) need; so Dice is taken per record, and class weights do not divide by the batch's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from medfl.common.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from medfl.common.statistics import Shared
    from medfl.common.study import Study

    Loss = Callable[[Tensor, Tensor], Tensor]

# Added to numerator and denominator of Dice, in voxels: a class that is absent from truth and
# prediction counts as right, and its gradient stays bounded.
DICE_SMOOTH = 1.0


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Cross-entropy of each record (B,), the mean over its voxels or labels.

    logits: (B, 1) two exclusive classes; (B, K) with targets (B,) int64 one of K classes, with
        targets (B, K) float any of K labels; (B, K, *spatial) with targets (B, *spatial).
    weights: (K,) factor for each class, (2,) for one logit; None = 1.
    """
    return _per_record(_pointwise(logits, targets, weights))


def focal(logits: Tensor, targets: Tensor, weights: Tensor | None, gamma: float) -> Tensor:
    """Focal loss (1 - p)^γ · cross-entropy of each record (B,) (Lin et al. 2017, eq. 4)."""
    import torch

    plain = _pointwise(logits, targets, None)
    weighted = plain if weights is None else _pointwise(logits, targets, weights)
    # exp(-ce) is the probability of the true class.
    return _per_record((1 - torch.exp(-plain)).clamp_min(1e-12) ** gamma * weighted)


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - mean soft Dice over the foreground classes of each record (B,) (Milletari et al. 2016).

    logits: (B, K, *spatial), background first; targets: (B, *spatial) class of each voxel.
    """
    import torch

    shares = logits.softmax(dim=1)[:, 1:].flatten(2)
    classes = torch.arange(1, logits.shape[1], device=logits.device)
    truth = (targets.flatten(1)[:, None, :] == classes[None, :, None]).to(shares.dtype)
    both = (shares * truth).sum(dim=2)
    sizes = shares.sum(dim=2) + truth.sum(dim=2)
    return 1 - ((2 * both + DICE_SMOOTH) / (sizes + DICE_SMOOTH)).mean(dim=1)


def class_weights(study: Study, shared: Shared) -> tuple[float, ...]:
    """The study's own weights, else N / (K · n_k) from all hospitals' counts: mean 1 over cases.

    Raises:
        ConfigError: the study has none and the counts are not shared.
    """
    if study.training.class_weights is not None:
        return tuple(study.training.class_weights)
    counts = [max(count, 1.0) for count in shared.class_counts]
    if not counts:
        raise ConfigError(
            f'training.class_weights: is missing; loss = "{study.training.loss}" needs one number '
            "a class, because the hospitals do not share class counts"
        )
    return tuple(sum(counts) / (len(counts) * count) for count in counts)


def build_loss(study: Study, shared: Shared) -> Loss:
    """(logits, targets) -> scalar: the study's loss as the mean over records.

    Raises:
        ConfigError: class weights are needed and unknown.
    """
    return LOSSES[study.training.loss](study, shared)


def _build_cross_entropy(study: Study, shared: Shared) -> Loss:
    return lambda logits, targets: cross_entropy(logits, targets, None).mean()


def _build_weighted(study: Study, shared: Shared) -> Loss:
    weights = class_weights(study, shared)
    return lambda logits, targets: cross_entropy(logits, targets, _like(weights, logits)).mean()


def _build_focal(study: Study, shared: Shared) -> Loss:
    gamma, given = study.training.focal_gamma, study.training.class_weights

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        weights = None if given is None else _like(tuple(given), logits)
        return focal(logits, targets, weights, gamma).mean()

    return loss


def _build_dice(study: Study, shared: Shared) -> Loss:
    return lambda logits, targets: dice(logits, targets).mean()


def _build_dice_ce(study: Study, shared: Shared) -> Loss:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return (dice(logits, targets) + cross_entropy(logits, targets, None)).mean()

    return loss


LOSSES: dict[str, Callable[[Study, Shared], Loss]] = {
    "cross_entropy": _build_cross_entropy,
    "weighted_cross_entropy": _build_weighted,
    "focal": _build_focal,
    "dice": _build_dice,
    "dice_ce": _build_dice_ce,
}


def _pointwise(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Cross-entropy of every label or voxel: (B,), (B, K) or (B, *spatial)."""
    from torch.nn import functional

    if targets.is_floating_point():
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses if weights is None else losses * weights
    truth = targets.long()
    if logits.shape[1] == 1:
        losses = functional.binary_cross_entropy_with_logits(
            logits[:, 0], truth.to(logits.dtype), reduction="none"
        )
    else:
        losses = functional.cross_entropy(logits, truth, reduction="none")
    return losses if weights is None else losses * weights[truth]


def _per_record(losses: Tensor) -> Tensor:
    return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)


def _like(weights: tuple[float, ...], logits: Tensor) -> Tensor:
    import torch

    return torch.tensor(weights, dtype=torch.float32, device=logits.device)
