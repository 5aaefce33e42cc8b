"""The study's optimiser, without what torch's own imports for the sake of `torch.compile`.

The first step of a `torch.optim.Optimizer` imports torch._dynamo, most of a second in each process.
On the CPU the same steps, to the bit, are taken by the functions behind torch's classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from medfl.common.study import Training

# torch's defaults; a study cannot change them.
_BETAS, _EPS = (0.9, 0.999), 1e-8


def make_optimiser(training: Training, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The study's optimiser; its learning rate is set before every step."""
    rate, decay = training.learning_rate, training.weight_decay
    if all(p.device.type == "cpu" for p in parameters):
        return (_Sgd if training.optimiser == "sgd" else _Adam)(training, parameters)
    if training.optimiser == "sgd":
        return torch.optim.SGD(parameters, rate, training.momentum, weight_decay=decay)
    kind = torch.optim.Adam if training.optimiser == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=decay)


class _Light(torch.optim.Optimizer, ABC):
    """What a training loop uses of an optimiser: `param_groups`, `zero_grad` and `step`."""

    def __init__(self, training: Training, parameters: Sequence[nn.Parameter]) -> None:
        # Not torch's own, whose first call it is that imports so much.
        self._training = training
        self.param_groups = [{"params": list(parameters), "lr": training.learning_rate}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """One step along the gradients; a parameter without one stays."""
        (group,) = self.param_groups
        moved = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
        self._move([i for i, _ in moved], [p for _, p in moved], group["lr"])

    @abstractmethod
    def _move(self, places: list[int], parameters: list[nn.Parameter], rate: float) -> None:
        """Take the step; `places` are those of `parameters` among all."""


class _Sgd(_Light):
    def __init__(self, training: Training, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(training, parameters)
        self._momenta: list[Tensor | None] = [None] * len(parameters)

    def _move(self, places: list[int], parameters: list[nn.Parameter], rate: float) -> None:
        momenta = [self._momenta[i] for i in places]
        sgd(
            list(parameters),
            _gradients(parameters),
            momenta,
            weight_decay=self._training.weight_decay,
            momentum=self._training.momentum,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for i, momentum in zip(places, momenta, strict=True):
            self._momenta[i] = momentum


class _Adam(_Light):
    """Adam, or AdamW."""

    def __init__(self, training: Training, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(training, parameters)
        self._means, self._squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        self._steps = [torch.tensor(0.0) for _ in parameters]

    def _move(self, places: list[int], parameters: list[nn.Parameter], rate: float) -> None:
        means, squares, steps = (
            [kept[i] for i in places] for kept in (self._means, self._squares, self._steps)
        )
        adam(
            list(parameters),
            _gradients(parameters),
            means,
            squares,
            [],
            steps,
            decoupled_weight_decay=self._training.optimiser == "adamw",
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=rate,
            weight_decay=self._training.weight_decay,
            eps=_EPS,
            maximize=False,
        )


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
