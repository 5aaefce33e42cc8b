"""What a catalogue entry is, and what every network is told about its input and output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

from medfl.common.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from medfl.common.study import Study

Input = Literal["image", "record"]
Output = Literal["scores", "masks"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What goes into a network and what comes out.

    size: (F,) features of a record, or the voxels of an image (H, W) or (X, Y, Z).
    channels: of an image; 0 for a record.
    outputs: logits a case (or a voxel): 1 where two classes exclude each other, else one a class;
        masks always have one a class, background included.
    """

    size: tuple[int, ...]
    channels: int
    outputs: int

    @property
    def dimensions(self) -> int:
        """2 or 3 for images."""
        return len(self.size)

    @property
    def numbers(self) -> int:
        """Numbers of one case when laid out flat."""
        return prod(self.size) * max(self.channels, 1)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One architecture.

    build: (Shape, *, options...) -> module; its keyword-only arguments are the study's options.
    inputs, output: what it can serve.
    channels_last: whether 2-D weights lie with their channels last in memory.
    needs: the module that `build` imports, seconds of work for MONAI's.
    """

    build: Callable[..., nn.Module]
    inputs: tuple[Input, ...]
    output: Output
    channels_last: bool = False
    needs: str = "torch"


def shape_of(study: Study, n_features: int | None = None) -> Shape:
    """The input and output of a study's network.

    n_features: numbers a record after encoding (categories become several).

    Raises:
        ConfigError: a record study without n_features.
    """
    task = study.task
    single = task.kind != "segmentation" and not task.multi_label and len(task.classes) == 2
    outputs = 1 if single else len(task.classes)
    if study.image is not None:
        return Shape(tuple(study.image.size), study.image.channels, outputs)
    if n_features is None:
        raise ConfigError("record: the number of encoded features is needed to build the model")
    return Shape((n_features,), 0, outputs)


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """`value`, or ConfigError naming what may stand there."""
    if value not in known:
        raise ConfigError(
            f"model.options.{option}: must be one of {', '.join(known)} (it is {value!r})"
        )
    return value
