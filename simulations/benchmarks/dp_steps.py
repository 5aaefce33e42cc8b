"""Steps of DP-SGD to measure: `python -m medfl.simulations.benchmarks.dp_steps WORK HOW REPEATS`.

HOW is `time` (all engines in turn, one process) or the name of an engine, whose memory alone is
then measured. A step is everything from a batch in memory to new weights: for the private ones also
the noise, medfl's from AES-256, Opacus's from torch's generator.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medfl.client.training.engines.choice import engine_for
from medfl.client.training.engines.engine import Bound, Engine
from medfl.client.training.engines.materialised import Materialised, per_record_gradients
from medfl.client.training.plan import DpPlan
from medfl.client.training.private import noise_generator, noisy_mean
from medfl.common.losses import cross_entropy, dice
from medfl.common.models import MODELS
from medfl.common.models.dp_fit import dp_fit
from medfl.common.models.entry import Shape

CLIP, SIGMA, RATE = 1.0, 1.0, 0.01


@dataclass(frozen=True, slots=True)
class StepWork:
    """A model of the catalogue with its default options, one channel, and a batch.

    within: how much a private step may cost, in plain steps; memory_within: of memory.
    """

    model: str
    side: int
    dimensions: int
    batch: int
    within: float
    memory_within: float | None

    @property
    def text(self) -> str:
        """For a table."""
        return f"{self.model} {self.side}^{self.dimensions} batch {self.batch}"


WORKS = {
    "cnn": StepWork("cnn", 28, 2, 64, 1.5, None),
    "unet2d-8": StepWork("unet", 64, 2, 8, 1.5, 1.5),
    "unet2d-32": StepWork("unet", 64, 2, 32, 1.5, 1.5),
    "unet3d-32": StepWork("unet", 32, 3, 4, 1.5, 1.5),
    "unet3d-64": StepWork("unet", 64, 3, 2, 1.5, 1.5),
    "densenet": StepWork("densenet121", 32, 2, 32, 2.0, None),
    "small": StepWork("strided_cnn", 8, 2, 4, 1.5, 1.5),
}


@dataclass(frozen=True, slots=True)
class Ready:
    """One way to do the step. clipped: the clipped sum by name, before noise; None for plain."""

    step: Callable[[], None]
    clipped: Callable[[], dict[str, Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """A model on its own, a batch for it, and the loss."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss_of: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, work: StepWork) -> Given:
        """The same numbers each time."""
        masks, size = MODELS[work.model].output == "masks", (work.side,) * work.dimensions
        torch.manual_seed(0)
        model = dp_fit(MODELS[work.model].build(Shape(size, 1, 3 if masks else 2))).train()
        x = torch.randn(work.batch, 1, *size)
        if masks:
            return cls(model, x, torch.randint(0, 3, (work.batch, *size)), _dice_ce)
        return cls(model, x, torch.randint(0, 2, (work.batch,)), _cross_entropy)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name."""
        return dict(self.model.named_parameters())


def plain(given: Given) -> Ready:
    """Without privacy."""
    optimiser = torch.optim.SGD(given.model.parameters(), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        given.loss_of(given.model(given.x), given.y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return Ready(step)


def _private(given: Given, engine: Engine) -> Ready:
    optimiser = torch.optim.SGD(given.model.parameters(), lr=1e-4)
    dp = DpPlan(SIGMA, RATE, CLIP)
    normal, sizes = noise_generator(dp), [1] * len(given.x)

    def clipped() -> dict[str, Tensor]:
        return engine.clipped_sum(given.x, given.y, sizes, Bound(CLIP))

    def step() -> None:
        mean = noisy_mean(clipped(), SIGMA * CLIP, float(len(given.x)), normal)
        for name, parameter in given.parameters.items():
            parameter.grad = mean[name]
        optimiser.step()

    return Ready(step, clipped)


def medfl(given: Given) -> Ready:
    """What a hospital trains with."""
    return _private(given, engine_for(given.model, given.loss_of))


def functorch(given: Given) -> Ready:
    """Every record's gradient by vmap, in medfl's own step."""
    gradients_of = per_record_gradients(given.model, given.loss_of)
    return _private(given, Materialised(given.parameters, gradients_of))


def opacus(given: Given) -> Ready:
    """Stock Opacus: its hooks, its optimiser, torch's noise."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(given.model)
    optimiser = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=len(given.x),
    )

    def backward() -> None:
        optimiser.zero_grad()
        given.loss_of(model(given.x), given.y).backward()  # type: ignore[no-untyped-call]

    def step() -> None:
        backward()
        optimiser.step()

    def clipped() -> dict[str, Tensor]:
        backward()
        optimiser.clip_and_accumulate()
        found = {n: p.summed_grad.detach().clone() for n, p in model._module.named_parameters()}
        optimiser.zero_grad()
        return found

    return Ready(step, clipped)


WAYS: dict[str, Callable[[Given], Ready]] = {
    "plain": plain,
    "medfl": medfl,
    "opacus": opacus,
    "functorch": functorch,
}


def timed(work: StepWork, repeats: int) -> dict[str, Any]:
    """Seconds of each step of each way, in turn, and how far the clipped sums are apart.

    apart: ‖sum - functorch's‖ / ‖functorch's‖. apart64: the same with functorch's in float64.
    noise: seconds of medfl's noise alone.
    """
    ready = {name: way(Given.of(work)) for name, way in WAYS.items()}
    sums = {name: _flat(r.clipped()) for name, r in ready.items() if r.clipped}
    exact = _exact(Given.of(work))
    apart = {name: _apart(s, sums["functorch"]) for name, s in sums.items()}
    apart64 = {name: _apart(s, exact) for name, s in sums.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(repeats + 1):
        for name, way in ready.items():
            begun = time.perf_counter()
            way.step()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
    dp = DpPlan(SIGMA, RATE, CLIP)
    normal, summed = noise_generator(dp), dict(Given.of(work).model.state_dict())
    begun = time.perf_counter()
    noisy_mean(summed, SIGMA * CLIP, 1.0, normal)
    noise = time.perf_counter() - begun
    return {"seconds": seconds, "apart": apart, "apart64": apart64, "noise": noise}


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _exact(given: Given) -> Tensor:
    x, y = (t.double() if t.is_floating_point() else t for t in (given.x, given.y))
    found = functorch(replace(given, model=given.model.double(), x=x, y=y)).clipped
    if found is None:
        raise TypeError("a private way has a clipped sum")
    return _flat(found())


def peak(work: StepWork, name: str, repeats: int) -> dict[str, Any]:
    """The most resident bytes that steps add to a process with the model and the batch."""
    way = WAYS[name](Given.of(work))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = _status("VmRSS")
    for _ in range(repeats):
        way.step()
    return {"bytes": _status("VmHWM") - before, "process_bytes": _status("VmHWM")}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)]).double()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, None).mean()


def _dice_ce(logits: Tensor, targets: Tensor) -> Tensor:
    return (dice(logits, targets) + cross_entropy(logits, targets, None)).mean()


if __name__ == "__main__":
    # Opacus leaves torch's warnings about hooks on layers whose inputs have no gradient.
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    chosen, how, times = WORKS[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    found = timed(chosen, times) if how == "time" else peak(chosen, how, times)
    print(json.dumps(found))
