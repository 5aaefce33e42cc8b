"""What the training loop sees: numbers ready for the network, whatever the format was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class CaseSet:
    """The cases of one part (train, validation or test) of one site.

    inputs: float32, (C, *spatial) a case for images or (F,) for records; one array (N, ...) where
        all cases have one shape (fast batches), else a sequence.
    targets: (N,) int64 class indices, (N, K) float32 for multi-label, or a sequence of uint8
        masks (*spatial).
    patients, keys: keyed hashes, one a case.
    """

    inputs: NDArray[np.float32] | Sequence[NDArray[np.float32]]
    targets: NDArray[np.generic] | Sequence[NDArray[np.uint8]]
    patients: tuple[str, ...]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)
