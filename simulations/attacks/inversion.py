"""Gradient inversion: the image behind a hospital's update of one step on one image.

The update is that of the real training loop. The attacker is a curious coordinator who knows the
weights, the learning rate and the class, and looks for an image whose gradient has the direction
of the update (Geiping et al. 2020, "Inverting gradients", eq. 4: cosine distance and total
variation).

Chests look alike, so what counts is what is this patient's own: the correlation of reconstruction
and image after the mean chest and the ways in which chests differ most (principal components of
other chests) were taken out of both. An unrelated chest has about 0 then.

Secure aggregation shows the attacker the sum alone. That hides an image among others, and nothing
more: where five hospitals send one image each, one of them may be the larger part of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfl.client.training.caseset import CaseSet
from medfl.client.training.loop import train
from medfl.client.training.plan import DpPlan, TrainPlan
from medfl.common import accounting, config, tensors
from medfl.common.losses import build_loss
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.noise import key_from
from medfl.common.seeds import derive
from medfl.common.statistics import Shared
from medfl.common.study import Study
from medfl.common.tensors import Tensors
from medfl.simulations.hospitals import anatomy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

Image = NDArray[np.float32]

SIDE, SITES, BATCH = 16, 5, 8
OTHERS, COMPONENTS = 100, 8
DELTA, EPSILONS = 1e-3, (8.0, 1.0)
_SHARED = Shared(private=True)
_TARGET = 1


@dataclass(frozen=True, slots=True)
class Inverted:
    """pictures: reconstructions (SIDE, SIDE) by protection. found: their correlations."""

    truth: Image
    pictures: Mapping[str, Image]
    found: Mapping[str, float]


def run(seed: int = 0, steps: int = 400) -> Inverted:
    """Look for one image in its hospital's update, in sums over hospitals, and under epsilon."""
    truth = image(seed, 0)
    model = build_model(_study(), _SHARED, seed=derive(seed, "weights"))
    seen = {"no protection": update(model, truth[None], seed)}
    for batch in (1, BATCH):
        what = f"sum of {SITES} sites,\n{batch} image{'s' if batch > 1 else ''} each"
        seen[what] = _sum([update(model, images(seed, n, batch), seed) for n in range(SITES)])
    for epsilon in EPSILONS:
        sigma = accounting.noise_multiplier_for(epsilon, DELTA, 1.0, 1)
        dp = DpPlan(sigma, 1.0, clip=1.0, n_declared=1, key=key_from(seed, "epsilon", str(epsilon)))
        seen[f"ε = {epsilon:g}"] = update(model, truth[None], seed, dp)
    pictures = {what: invert(model, delta, seed, steps) for what, delta in seen.items()}
    found = {what: found_in(picture, truth) for what, picture in pictures.items()}
    return Inverted(truth, pictures, found)


def image(seed: int, number: int) -> Image:
    """(SIDE, SIDE) one chest, mean 0 and standard deviation 1 as the network gets it."""
    rng = np.random.default_rng(derive(seed, "chest", number))
    fine = anatomy.chest(rng, (2 * SIDE, 2 * SIDE), opacity=True)
    return _scaled(fine.reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3)))


def images(seed: int, site: int, batch: int) -> Image:
    """(batch, SIDE, SIDE) of one site; those of site 0 begin with the image that is looked for."""
    return np.stack([image(seed, site * BATCH + n) for n in range(batch)])


def update(model: nn.Module, pictures: Image, seed: int, dp: DpPlan | None = None) -> Tensors:
    """What a hospital with these images sends after one step; `model` stays as it was."""
    import copy

    own, before = copy.deepcopy(model), get_weights(model)
    names = tuple(str(n) for n in range(len(pictures)))
    cases = CaseSet(pictures[:, None], np.full(len(pictures), _TARGET), names, names)
    train(own, cases, _study(), _SHARED, TrainPlan(1, 1, seed=seed, dp=dp))
    return tensors.subtract(get_weights(own), before)


def invert(model: nn.Module, delta: Tensors, seed: int, steps: int) -> Image:
    """The image whose gradient points where this update comes from; starts from noise."""
    import torch

    names = [name for name, _ in model.named_parameters()]
    wanted = torch.cat([torch.from_numpy(-delta[name]).ravel() for name in names])
    guess = torch.randn(
        (1, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(seed), requires_grad=True
    )
    optimiser = torch.optim.Adam([guess], lr=0.1)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = _distance(model, guess, wanted) + 1e-3 * _variation(guess)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        falling.step()
    return _scaled(guess.detach().numpy()[0, 0])


def own_part(picture: Image) -> NDArray[np.float64]:
    """(SIDE * SIDE,) the picture without what other chests have in common."""
    flat, common = picture.ravel().astype(np.float64), _common()
    return np.asarray(flat - common.T @ (common @ flat))


def found_in(picture: Image, truth: Image) -> float:
    """Correlation of two images' own parts; 1: the same patient, 0: nothing found."""
    return float(np.corrcoef(own_part(picture), own_part(truth))[0, 1])


def draw(found: Inverted, figure: Figure) -> None:
    """The image, another chest, and what each protection leaves of it."""
    shown = {"the image": found.truth, "another chest": _others()[0], **found.pictures}
    axes = figure.subplots(1, len(shown))
    for ax, (what, picture) in zip(axes, shown.items(), strict=True):
        ax.imshow(picture, cmap="gray", interpolation="nearest", vmin=-2, vmax=2)
        ax.set_axis_off()
        correlation = found.found.get(what)
        ax.set_title(what if correlation is None else f"{what}\n{correlation:.2f}", loc="center")


def _distance(model: nn.Module, guess: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine of the guess's gradient and the one looked for."""
    import torch

    loss = build_loss(_study(), _SHARED)(model(guess), torch.tensor([_TARGET]))
    parts = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    gradient = torch.cat([part.ravel() for part in parts])
    return 1 - torch.nn.functional.cosine_similarity(gradient, wanted, dim=0)


def _variation(guess: Tensor) -> Tensor:
    across, down = guess.diff(dim=-1).abs().mean(), guess.diff(dim=-2).abs().mean()
    return across + down


def _sum(deltas: Sequence[Tensors]) -> Tensors:
    total = deltas[0]
    for delta in deltas[1:]:
        total = tensors.add(total, delta)
    return total


@cache
def _others() -> Image:
    """(n, SIDE, SIDE) chests that anybody has."""
    return np.stack([image(-1, n) for n in range(OTHERS)])


@cache
def _common() -> NDArray[np.float64]:
    """(1 + COMPONENTS, SIDE * SIDE) orthonormal: the mean chest, and how chests differ most."""
    flat = _others().reshape(OTHERS, -1).astype(np.float64)
    mean = flat.mean(axis=0)
    differing = np.linalg.svd(flat - mean, full_matrices=False)[2][:COMPONENTS]
    return np.linalg.qr(np.stack([mean, *differing]).T)[0].T


def _scaled(picture: NDArray[np.floating]) -> Image:
    return np.asarray((picture - picture.mean()) / picture.std(), dtype=np.float32)


@cache
def _study() -> Study:
    plain = {
        "name": "inversion",
        "task": {"kind": "classification", "classes": ["normal", "opacity"]},
        "image": {"dimensions": 2, "size": [SIDE, SIDE]},
        "model": {"name": "strided_cnn", "options": {"channels": [16]}},
        "training": {"learning_rate": 0.1, "batch_size": BATCH, "local_steps": 1},
        "federation": {"rounds": 1},
    }
    return config.parse(plain, Study, "inversion")
