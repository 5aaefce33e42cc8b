"""What a network says about cases: probabilities, or a label for every voxel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfl.client.training.batches import pad_to, rows
from medfl.client.training.caseset import CaseSet
from medfl.common.models.weights import place
from medfl.common.study import Study

# Neighbouring windows share a quarter of their side.
OVERLAP = 0.25
WINDOWS_AT_ONCE = 4


def predict(
    model: nn.Module, cases: CaseSet, study: Study, device: str
) -> Iterator[NDArray[np.float32] | Sequence[NDArray[np.uint8]]]:
    """Predictions batch by batch, in the order of the cases.

    Classification and risk: (B, 1) probability of the second class, or (B, C) of each class.
    Segmentation: B label maps (*spatial) uint8, of each image's own size where sizes differ.
    The model predicts in evaluation mode and full precision, and is left in the mode it was in.
    """
    was_training = model.training
    place(model, device).eval()
    try:
        if study.image is not None and study.image.fit == "keep":
            yield from _by_windows(model, cases, tuple(study.image.size), device)
        else:
            yield from _by_batches(model, cases, study, device)
    finally:
        model.train(was_training)


def _by_batches(
    model: nn.Module, cases: CaseSet, study: Study, device: str
) -> Iterator[NDArray[np.float32] | Sequence[NDArray[np.uint8]]]:
    size = study.training.batch_size
    for start in range(0, len(cases), size):
        positions = np.arange(start, min(start + size, len(cases)))
        inputs = torch.from_numpy(np.ascontiguousarray(rows(cases.inputs, positions))).to(device)
        # Not around the loop: whoever iterates would find gradients switched off between batches.
        with torch.no_grad():
            logits = model(inputs)
        if study.task.kind == "segmentation":
            yield list(_labels(logits))
        else:
            yield probabilities(logits, study.task.multi_label).float().cpu().numpy()


def probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """(B, 1) or (B, C) logits -> probabilities; classes of one case sum to 1 unless multi-label."""
    if multi_label or logits.shape[1] == 1:
        return logits.sigmoid()
    return logits.softmax(dim=1)


def _by_windows(
    model: nn.Module, cases: CaseSet, size: tuple[int, ...], device: str
) -> Iterator[Sequence[NDArray[np.uint8]]]:
    from monai.inferers.utils import sliding_window_inference

    for image in cases.inputs:
        padded = pad_to(image, size)
        # A copy, because pictures from the cache are read-only, which torch warns of.
        inputs = torch.from_numpy(np.array(padded)).to(device)
        with torch.no_grad():
            logits: Any = sliding_window_inference(
                inputs[None], size, WINDOWS_AT_ONCE, model, overlap=OVERLAP, mode="gaussian"
            )
        labels = _labels(logits)[0]
        yield [labels[_middle(labels.shape, image.shape[1:])]]


def _labels(logits: Tensor) -> NDArray[np.uint8]:
    return logits.argmax(dim=1).to(torch.uint8).cpu().numpy()


def _middle(outer: tuple[int, ...], inner: tuple[int, ...]) -> tuple[slice, ...]:
    """Where `pad_to` put the original."""
    starts = [(o - i) // 2 for o, i in zip(outer, inner, strict=True)]
    return tuple(slice(s, s + i) for s, i in zip(starts, inner, strict=True))
