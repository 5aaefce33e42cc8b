"""The optimisers of the CPU: torch's own steps, by hand and to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medfl.client.training.optimisers import make_optimiser


def test_momentum_by_hand(make_study) -> None:
    training = make_study(features=2, optimiser="sgd", learning_rate=0.1, momentum=0.5).training
    weight = nn.Parameter(torch.tensor([1.0]))
    optimiser = make_optimiser(training, [weight])
    for expected in (1 - 0.1 * 2, 0.8 - 0.1 * (0.5 * 2 + 2)):
        optimiser.zero_grad()
        (2 * weight).sum().backward()
        optimiser.step()
        assert weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_step_is_that_of_torch_to_the_bit(name: str, make_study) -> None:
    training = make_study(
        features=2, optimiser=name, learning_rate=0.05, momentum=0.9, weight_decay=0.01
    ).training
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(shape, generator=generator) for shape in ((5, 3), (4,), (2,))]
    ours, theirs = ([nn.Parameter(t.clone()) for t in first] for _ in range(2))
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    more = {"momentum": 0.9} if name == "sgd" else {}
    both = [
        (make_optimiser(training, ours), ours),
        (kinds[name](theirs, lr=0.05, weight_decay=0.01, **more), theirs),
    ]
    for step in range(6):
        gradients = [torch.randn(p.shape, generator=generator) for p in first]
        for optimiser, parameters in both:
            optimiser.zero_grad(set_to_none=True)
            optimiser.param_groups[0]["lr"] = 0.05 / (step + 1)
            for k, parameter in enumerate(parameters):
                # The second has no gradient in every other step, the third never has one.
                if k == 0 or (k == 1 and step % 2):
                    parameter.grad = gradients[k].clone()
            optimiser.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
    assert torch.equal(ours[2], first[2])
    assert not torch.equal(ours[1], first[1])
