"""Whose random numbers are whose: patches, changes of images, dropout and who takes part.

Without privacy one stream after another serves whole batches. Under privacy every record has
numbers of its own, which follow from the hospital's secret key, the step and the record's name. A
stream that is shared by place in the batch would hand everybody behind a patient other numbers
when that patient leaves, and each of them would move the sum by up to two clipping bounds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from medfl.common.errors import ConfigError
from medfl.common.noise import NAME_WORDS, words_by_name
from medfl.common.seeds import derive

Names = NDArray[np.uint32]
Positions = NDArray[np.int64]


class Draws(Protocol):
    """Random numbers for the records of a batch, a row each."""

    def uniform(self, *shape: int) -> Tensor:
        """(records, *shape) float32 in [0, 1)."""

    def normal(self, *shape: int) -> Tensor:
        """(records, *shape) float32, standard normal."""

    def whole(self, below: int) -> Tensor:
        """(records,) int64 from 0 to below - 1."""

    def of(self, purpose: str, rows: Tensor | None = None) -> Draws:
        """Others, of some records for one purpose."""


class FromOne:
    """One generator for all records, in their order."""

    def __init__(self, generator: Generator, n: int) -> None:
        self._generator, self._n = generator, n

    def uniform(self, *shape: int) -> Tensor:
        """As `Draws.uniform`."""
        return torch.rand((self._n, *shape), generator=self._generator)

    def normal(self, *shape: int) -> Tensor:
        """As `Draws.normal`."""
        return torch.randn((self._n, *shape), generator=self._generator)

    def whole(self, below: int) -> Tensor:
        """As `Draws.whole`."""
        return torch.randint(0, below, (self._n,), generator=self._generator)

    def of(self, purpose: str, rows: Tensor | None = None) -> FromOne:
        """The same generator."""
        return FromOne(self._generator, self._n if rows is None else len(rows))


class Own:
    """Each record's own: no number depends on who else is in the batch, or on where it stands."""

    def __init__(self, key: bytes, names: Names, purpose: str) -> None:
        self._key, self._names, self._purpose = key, names, purpose
        self._calls = 0

    def words(self, n: int) -> NDArray[np.uint32]:
        """(records, n)."""
        self._calls += 1
        return words_by_name(self._key, f"{self._purpose}\x1f{self._calls}", self._names, n)

    def uniform(self, *shape: int) -> Tensor:
        """As `Draws.uniform`: multiples of 2^-24."""
        numbers = (self.words(math.prod(shape)) >> np.uint32(8)).astype(np.float32)
        return torch.from_numpy(numbers * np.float32(2.0**-24)).reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """As `Draws.normal` (Box and Muller 1958)."""
        half = (math.prod(shape) + 1) // 2
        numbers = torch.from_numpy((self.words(2 * half) + 0.5) * 2.0**-32)
        radius = numbers[:, :half].log().mul(-2).sqrt()
        angle = numbers[:, half:] * (2 * math.pi)
        made = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return made[:, : math.prod(shape)].float().reshape(-1, *shape)

    def whole(self, below: int) -> Tensor:
        """As `Draws.whole`."""
        words = self.words(1)[:, 0].astype(np.uint64)
        return torch.from_numpy(((words * np.uint64(below)) >> np.uint64(32)).astype(np.int64))

    def of(self, purpose: str, rows: Tensor | None = None) -> Own:
        """Numbers that nothing else uses."""
        names = self._names if rows is None else self._names[rows.cpu().numpy()]
        return Own(self._key, names, f"{self._purpose}\x1f{purpose}")


class Randomness(Protocol):
    """What a source of batches draws from."""

    def patches(self, positions: Positions) -> Iterable[np.random.Generator]:
        """A generator for each record, for the place of its patch."""

    def changes(self, positions: Positions) -> Draws:
        """For augmentation."""


class FromSeed:
    """Of training without privacy: everything follows from the plan's seed."""

    def __init__(self, seed: int) -> None:
        self._patches = np.random.default_rng(derive(seed, "patches"))
        self._changes = Generator().manual_seed(derive(seed, "augment"))

    def patches(self, positions: Positions) -> Iterable[np.random.Generator]:
        """One for all."""
        return repeat(self._patches)

    def changes(self, positions: Positions) -> Draws:
        """As `Randomness.changes`."""
        return FromOne(self._changes, len(positions))


class OfEach:
    """Of training under privacy: a record's numbers by the hospital's key, the step and its name.

    step: of the round, from 0. batch: the records that the model sees now.
    """

    def __init__(self, key: bytes, keys: Sequence[str]) -> None:
        self._key, self._names = key, names_of(keys)
        self.step = 0
        self.batch: Positions = np.zeros(0, dtype=np.int64)

    def own(self, positions: Positions, purpose: str) -> Own:
        """These records' numbers for one purpose in this step."""
        return Own(self._key, self._names[positions], f"step {self.step}\x1f{purpose}")

    def patches(self, positions: Positions) -> Iterator[np.random.Generator]:
        """As `Randomness.patches`, each under a seed of its record."""
        for words in self.own(positions, "patch").words(4):
            yield np.random.default_rng(words.tolist())

    def changes(self, positions: Positions) -> Draws:
        """As `Randomness.changes`."""
        return self.own(positions, "change")

    def kept(self, purpose: str, n: int, share: float) -> Tensor:
        """(records of `batch`, n) bool, each True with probability `share`."""
        words = self.own(self.batch, purpose).words(n)
        return torch.from_numpy(words < min(round(share * 2**32), 2**32 - 1))


def names_of(texts: Sequence[str]) -> Names:
    """(n, 3): of each text the first 96 bits of its SHA-256, which no two in practice share."""
    whole = b"".join(hashlib.sha256(t.encode()).digest()[: 4 * NAME_WORDS] for t in texts)
    return np.frombuffer(whole, dtype="<u4").reshape(-1, NAME_WORDS)


class OutsideRandomnessError(ConfigError):
    """A model draws random numbers that are not its records' own."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"model: {what}, so that a patient's absence would change what others draw; it cannot "
            "train under differential privacy. Use dropout layers, or none"
        )
