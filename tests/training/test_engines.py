"""Engines of DP-SGD: whichever makes the clipped sum, it is the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medfl.client.training.engines.bookkeeping import BookKeeping
from medfl.client.training.engines.choice import engine_for
from medfl.client.training.engines.engine import Bound, Engine, NotCoveredError, squared_norms
from medfl.client.training.engines.materialised import Materialised, per_record_gradients
from medfl.common.losses import LOSSES, build_loss
from medfl.common.models import DP_MODELS, build_model
from medfl.common.statistics import Shared

PRIVATE = Shared(private=True)
Loss = Callable[[Tensor, Tensor], Tensor]
Engines = tuple[Engine, Engine]


def engines_of(model: nn.Module, loss_of: Loss) -> Engines:
    """Book-keeping and the reference."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reference = Materialised(parameters, per_record_gradients(model, loss_of))
    return BookKeeping(model, loss_of), reference


def mean_output(logits: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient is that of the outputs' mean."""
    return (logits.flatten(1).sum(dim=1) * targets).mean()


def smallest_norm(engine: Engine, x: Tensor, y: Tensor) -> float:
    norms = [norm_of(engine.total(x[i : i + 1], y[i : i + 1])) for i in range(len(x))]
    return min(norms)


def norm_of(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


def check(
    engines: Engines, x: Tensor, y: Tensor, sizes: list[int], clip: float | None = None
) -> None:
    """The same sums, clipped where some units are and others are not, and the same totals."""
    ours, reference = engines
    # Just above the smallest norm: that record stays as it is, longer ones are cut.
    bound = clip or 1.01 * smallest_norm(reference, x, y)
    scale = 1e-9 if x.dtype == torch.float64 or not x.is_floating_point() else 1e-4
    counts = Bound(bound), Bound(bound)
    for found, wanted in (
        (ours.clipped_sum(x, y, sizes, counts[0]), reference.clipped_sum(x, y, sizes, counts[1])),
        (ours.total(x, y), reference.total(x, y)),
    ):
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            largest = float(gradient.abs().max())
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-6, atol=scale * max(largest, 1e-3)
            )
    assert counts[0].within == counts[1].within


@pytest.mark.parametrize("which", [0, 1])
def test_a_clipped_sum_by_hand(which: int) -> None:
    # Gradients (3, 4) and (.3, .4): the first is cut to length 1. As one unit: their mean, cut.
    model = nn.Linear(2, 1, bias=False)
    engine = engines_of(model, mean_output)[which]
    x, y = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.ones(2)
    assert engine.clipped_sum(x, y, [1, 1], Bound(1.0))["weight"].tolist()[0] == pytest.approx(
        [0.9, 1.2]
    )
    assert engine.clipped_sum(x, y, [2], Bound(1.0))["weight"].tolist()[0] == pytest.approx(
        [0.6, 0.8]
    )
    assert engine.clipped_sum(x, y, [2], Bound(9.0))["weight"].tolist()[0] == pytest.approx(
        [1.65, 2.2]
    )
    assert engine.total(x, y)["weight"].tolist()[0] == pytest.approx([3.3, 4.4])


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        *((name, 2) for name in DP_MODELS if name not in ("resnet34", "resnet50")),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("resnet34", "resnet50")),
        *((name, 3) for name in ("cnn", "unet", "segresnet")),
    ],
)
@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 1]])
def test_all_engines_give_one_sum_for_every_model(name, dimensions, sizes, make_tried) -> None:
    study, x, y = make_tried(name, dimensions, n=3)
    model = build_model(study, PRIVATE, seed=0).double()
    check(engines_of(model, build_loss(study, PRIVATE)), x, y, sizes)
    assert engine_for(model, build_loss(study, PRIVATE)).name == "book-keeping"


@pytest.mark.parametrize("name", ["cnn", "unet", "segresnet", "attention_unet"])
def test_engines_draw_the_same_dropout(name: str, make_tried) -> None:
    study, x, y = make_tried(name, 2, n=3, dropout=0.5)
    model = build_model(study, PRIVATE, seed=0).double()
    sums = []
    for engine in engines_of(model, build_loss(study, PRIVATE)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            sums.append(engine.clipped_sum(x, y, [1, 1, 1], Bound(0.1)))
            sums.append(engine.total(x, y))
    for found, wanted in zip(sums[:2], sums[2:], strict=True):
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_engines_agree_on_every_loss(loss: str, make_study) -> None:
    study = make_study(
        "unet",
        [8, 8],
        kind="segmentation",
        classes=3,
        loss=loss,
        options={"channels": [4, 8]},
        class_weights=[1.0, 2.0, 3.0] if loss in ("weighted_cross_entropy", "focal") else None,
    )
    model = build_model(study, PRIVATE, seed=0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    y = torch.randint(0, 3, (3, 8, 8), generator=generator)
    check(engines_of(model, build_loss(study, PRIVATE)), x, y, [1, 1, 1])


class Sentence(nn.Module):
    """Words (B, T) -> (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4, padding_idx=0)
        self.norm, self.hidden, self.out = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.norm(self.words(x))).mean(dim=1))


class InPlace(nn.Module):
    """Adds to and rectifies what layers have put out, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act = nn.GroupNorm(2, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        out = self.norm(self.second(x))
        out += x
        return self.act(out)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1-D": (nn.Conv1d(2, 3, 3, padding=1), (2, 9)),
    "strided": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 9, 8)),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=2), (2, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "dilated to one": (nn.Conv2d(16, 16, 3, dilation=2), (16, 5, 5)),
    "pointwise": (nn.Conv2d(4, 6, 1), (4, 5, 5)),
    "ghost 1-D": (nn.Conv1d(20, 30, 3, padding=1), (20, 5)),
    "ghost": (nn.Conv2d(16, 16, 3, stride=2, padding=1), (16, 4, 4)),
    "ghost 3-D": (nn.Conv3d(16, 32, 3, padding=(1, 0, 1)), (16, 2, 3, 2)),
    "ghost pointwise": (nn.Conv2d(32, 32, 1), (32, 2, 2)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 4, 4)),
    "transposed 3-D": (nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2), (4, 2, 2, 2)),
    "transposed 1-D": (nn.ConvTranspose1d(40, 30, 1), (40, 3)),
    "linear over rows": (nn.Sequential(nn.Linear(6, 5), nn.PReLU(7)), (7, 6)),
    "instance 1-D": (nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.PReLU(3)), (3, 6)),
    "group without bias": (nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU()), (4, 6)),
    "layer norm": (nn.LayerNorm([3, 4]), (5, 3, 4)),
    "in place": (InPlace(), (1, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [1, 2, 1]])
def test_engines_agree_on_layers_that_no_model_has(name: str, sizes: list[int]) -> None:
    model, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    y = torch.tensor([1.0, -2.0, 5.0, 0.5], dtype=torch.float64)

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return mean_output(logits.square(), targets)

    check(engines_of(model.double(), loss_of), x, y, sizes)


@pytest.mark.parametrize("sizes", [[1, 1, 1], [1, 2]])
def test_engines_agree_on_words_and_their_padding(sizes: list[int]) -> None:
    x, y = torch.tensor([[0, 1, 1], [4, 2, 0], [3, 3, 2]]), torch.tensor([1.0, -1.0, 2.0]).double()
    check(engines_of(Sentence().double(), mean_output), x, y, sizes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["cnn", "unet", "densenet"])
def test_a_record_that_is_not_a_number_leaves_the_others_as_they_are(
    value: float, name: str, make_tried
) -> None:
    study, x, y = make_tried(name, 2, n=3)
    model, x = build_model(study, PRIVATE, seed=0), x.float()
    broken = x.clone()
    broken[1] = value
    for engine in engines_of(model, build_loss(study, PRIVATE)):
        rest = engine.clipped_sum(x[[0, 2]], y[[0, 2]], [1, 1], Bound(0.5))
        found = engine.clipped_sum(broken, y, [1, 1, 1], Bound(0.5))
        moved = {key: found[key] - rest[key] for key in rest}
        assert norm_of(moved) <= 0.5 * (1 + 1e-4)
        assert not any(gradient.requires_grad for gradient in found.values())
        if value != 1e30:
            assert norm_of(moved) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_record_of_a_patient_with_two_costs_nobody_else(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.tensor([[1.0, -2.0, 0.5, 3.0], [1, 1, 1, 1], [2, 0, 1, -1], [0.1, 0.2, -3, 1]])
    y, broken = torch.tensor([1.0, 1.0, -2.0, 3.0]), x.clone()
    broken[1] = value
    for engine in engines_of(model, mean_output):
        rest = engine.clipped_sum(x[[0, 3]], y[[0, 3]], [1, 1], Bound(0.5))
        found = engine.clipped_sum(broken, y, [1, 2, 1], Bound(0.5))
        for name, gradient in rest.items():
            torch.testing.assert_close(found[name], gradient)


def test_a_sum_over_records_that_are_all_broken_is_zero() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.full((2, 16, 2, 2), float("inf")), torch.ones(2)
    assert norm_of(BookKeeping(model, mean_output).clipped_sum(x, y, [1, 1], Bound(1.0))) == 0


def test_a_ghost_norm_that_overflows_is_no_small_norm() -> None:
    # Two rows of 1e20 whose output gradients differ in sign: inf - inf.
    model = nn.Sequential(nn.Conv1d(16, 16, 1, bias=False))
    x = torch.cat([torch.full((1, 16, 2), 1e20), torch.full((1, 16, 2), 1e-3)])
    signs = torch.tensor([1e3, -1e3])

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits * signs).sum(dim=(1, 2)).mean()

    found = BookKeeping(model, loss_of).clipped_sum(x, torch.ones(2), [1, 1], Bound(1.0))
    assert norm_of(found) <= 1.0 + 1e-5


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x).tanh())


class Read(nn.Module):
    """A layer whose weight is also read by somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.a(x).tanh(), self.a.weight)


class Own(nn.Module):
    """A parameter without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Derived(nn.Linear):
    """A layer that does more than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("model", [Tied(), Twice(), Read(), Own(), Derived(3, 3)])
def test_a_model_that_no_rule_covers_is_left_to_the_reference(model: nn.Module) -> None:
    x, y = torch.tensor([[1.0, -2.0, 0.5], [2.0, 0.3, -1.0]]), torch.tensor([1.0, -3.0])
    chosen = engine_for(model, mean_output)
    parameters = dict(model.named_parameters())
    reference = Materialised(parameters, per_record_gradients(model, mean_output))
    wanted = reference.clipped_sum(x, y, [1, 1], Bound(0.7))
    for _ in range(2):
        found = chosen.clipped_sum(x, y, [1, 1], Bound(0.7))
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient)
    assert chosen.name == "functorch"
    with pytest.raises(NotCoveredError):
        BookKeeping(model, mean_output).clipped_sum(x, y, [1, 1], Bound(0.7))
    assert "forward" not in vars(model)
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_weights_have_no_gradient_and_the_norm_is_that_of_the_others() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.PReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[3].requires_grad_(False)
    x = torch.tensor([[1.0, -2.0, 0.5], [2.0, 0.3, -1.0]], dtype=torch.float64)
    check(engines_of(model.double(), mean_output), x, torch.tensor([1.0, -3.0]).double(), [1, 1])


def test_no_layer_stays_changed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.GroupNorm(1, 3))
    engine = BookKeeping(model, mean_output)
    engine.clipped_sum(torch.ones(2, 2), torch.ones(2), [1, 1], Bound(1.0))
    with pytest.raises(RuntimeError):
        engine.clipped_sum(torch.ones(2, 5), torch.ones(2), [1, 1], Bound(1.0))
    assert all("forward" not in vars(layer) for layer in model.modules())
    assert all(p.grad is None for p in model.parameters())


def contribution(engine: Engine, x: Tensor, y: Tensor, sizes: list[int], clip: float) -> float:
    """The length of a clipped sum in bounds, computed without rounding."""
    found = engine.clipped_sum(x, y, sizes, Bound(clip))
    return math.sqrt(sum(float(g.double().square().sum()) for g in found.values())) / clip


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("spread", [0.02, 1.0, 50.0])
def test_two_records_that_nearly_cancel_stay_within_the_bound(which: int, spread: float) -> None:
    # A field of 250,000 and a patient with two records, one of each label: 6e10 - 6e10 in float32.
    generator = torch.Generator().manual_seed(5)
    for width in (8, 64):
        model = nn.Linear(width, 1)
        engine = engines_of(model, mean_output)[which]
        for _ in range(30):
            noise = torch.randn(2, width, generator=generator)
            x, y = 2.5e5 + spread * noise, torch.tensor([1.0, -1.0])
            assert contribution(engine, x, y, [2], clip=0.01) <= 1 + 1e-6


def test_the_length_of_two_opposite_records_by_hand() -> None:
    # (250050, 1) - (249950, 1), halved: 50 along each of 16 inputs, 0 for the bias: norm 200. What
    # rounding may hide is 10 last bits of a sum of 250,000 · sqrt(16): 1.2, or six in a thousand.
    engine = engines_of(nn.Linear(16, 1), mean_output)[0]
    x = torch.tensor([[250_050.0], [249_950.0]]).expand(2, 16)
    found = contribution(engine, x, torch.tensor([1.0, -1.0]), [2], clip=1.0)
    assert 0.99 < found <= 1


@pytest.mark.parametrize("kernel", [1, 3])
def test_voxels_that_nearly_cancel_stay_within_the_bound(kernel: int) -> None:
    # A convolution over few voxels with activations of 1e4; output gradients sum up to zero.
    generator = torch.Generator().manual_seed(6)
    model = nn.Conv2d(64, 64, kernel, padding=kernel // 2)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(2, 2)

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return ((logits * signs).flatten(1).sum(dim=1) * targets).mean()

    for engine in engines_of(model, loss_of):
        for spread in (1e-3, 0.1, 10.0):
            flat = 1e4 + spread * torch.randn(1, 64, 2, 2, generator=generator)
            assert contribution(engine, flat, torch.ones(1), [1], clip=0.1) <= 1 + 1e-6


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
def test_no_constructed_weights_bring_a_unit_beyond_the_bound(exponent: int) -> None:
    # Layers whose scales differ by 10^exponent; units of one, two and three records together.
    generator = torch.Generator().manual_seed(exponent + 50)
    for _ in range(5):
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8), nn.Linear(8, 1))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
            model[0].weight.mul_(10.0 ** (exponent / 3))
            model[2].weight.mul_(10.0**exponent)
        half = torch.randn(1, 16, generator=generator)
        x = torch.cat([half, half + 1e-4 * torch.randn(1, 16, generator=generator)])
        for engine in engines_of(model, mean_output):
            assert contribution(engine, x, torch.tensor([1.0, -1.0]), [2], clip=0.1) <= 1 + 1e-6
            assert contribution(engine, x, torch.tensor([1.0, -1.0]), [1, 1], clip=0.1) <= 2 + 2e-6


def test_norms_of_millions_of_numbers_are_summed_without_loss() -> None:
    # Once 2^12, whose square ends a float32's digits, and 2^22 ones that such a sum would lose.
    t = torch.ones(1, 2**22 + 1)
    t[0, 0] = 2.0**12
    assert squared_norms(t).tolist() == [2.0**24 + 2.0**22]
