"""Random image changes: known results, masks that move along, seeds, faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medfl.client.training import warp
from medfl.client.training.augment import AUGMENTATIONS, augment, augmentations
from medfl.client.training.draws import FromOne
from medfl.common.errors import ConfigError

SPATIAL = ["flip", "rotate90", "rotate", "zoom", "affine", "elastic"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(n: int) -> FromOne:
    return FromOne(generator(), n)


def steps(make_study, *names: str, size=(8, 8), **options):
    listed = [{"name": n, "probability": 1, "options": options or None} for n in names]
    return augmentations(make_study("cnn", list(size), augment=listed))


def images(*size: int, n: int = 6) -> torch.Tensor:
    return torch.randn(n, 2, *size, generator=generator(9))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(9, 8), (7, 8, 6)])
def test_every_change_keeps_shape_seed_and_its_argument(name, size, make_study) -> None:
    x = images(*size)
    kept, listed = x.clone(), steps(make_study, name, size=size)
    first, _ = augment(listed, x, torch.zeros(6), seeded(6))
    again, _ = augment(listed, x, torch.zeros(6), seeded(6))
    assert torch.equal(x, kept)
    assert torch.equal(first, again)
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert torch.isfinite(first).all()
    assert not torch.equal(first, x)


@pytest.mark.parametrize("name", SPATIAL)
def test_masks_move_with_their_images(name, make_study) -> None:
    masks = torch.zeros(6, 16, 16, dtype=torch.uint8)
    masks[:, 1:14, 2:15] = 2
    x = masks[:, None].float().repeat(1, 2, 1, 1)
    moved, followed = augment(steps(make_study, name, size=(16, 16)), x, masks, seeded(6))
    assert followed.dtype == torch.uint8
    assert set(followed.unique().tolist()) <= {0, 2}
    # The image is interpolated and the mask is not: at a corner, 3/4 of the step of 2 at most.
    assert float((moved[:, 0] - followed.float()).abs().max()) <= 1.5 + 1e-4
    assert not torch.equal(followed, masks)


def test_each_record_is_changed_as_often_as_its_probability(make_study) -> None:
    listed = augmentations(
        make_study("cnn", augment=[{"name": "intensity_shift", "probability": 0.25}])
    )
    x = images(8, 8, n=2000)
    changed, _ = augment(listed, x, torch.zeros(2000), seeded(2000))
    share = float((changed != x).flatten(1).any(dim=1).float().mean())
    assert share == pytest.approx(0.25, abs=0.04)


def test_flips_mirror_one_of_the_named_axes(make_study) -> None:
    x = images(4, 5)
    rows, _ = augment(steps(make_study, "flip", axes=[0]), x, torch.zeros(6), seeded(6))
    assert torch.equal(rows, x.flip(2))
    either, _ = augment(steps(make_study, "flip"), x, torch.zeros(6), seeded(6))
    kinds = [torch.equal(e, o.flip(1)) for e, o in zip(either, x, strict=True)]
    assert all(
        kind or torch.equal(e, o.flip(2)) for kind, e, o in zip(kinds, either, x, strict=True)
    )
    assert 0 < sum(kinds) < 6


def test_inversion_swaps_the_extremes_of_each_image(make_study) -> None:
    x = torch.tensor([[[[1.0, 2.0, 5.0]]]])
    changed, _ = augment(steps(make_study, "invert"), x, torch.zeros(1), seeded(1))
    assert changed.flatten().tolist() == [5, 4, 1]


def test_contrast_and_scale_keep_what_they_promise(make_study) -> None:
    x = images(8, 8)
    changed, _ = augment(steps(make_study, "contrast"), x, torch.zeros(6), seeded(6))
    assert torch.allclose(changed.flatten(1).amax(1), x.flatten(1).amax(1), atol=1e-5)
    assert torch.allclose(changed.flatten(1).amin(1), x.flatten(1).amin(1), atol=1e-5)
    scaled, _ = augment(steps(make_study, "intensity_scale", by=0.5), x, torch.zeros(6), seeded(6))
    ratio = (scaled / x).flatten(1)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)
    assert float((ratio[:, 0] - 1).abs().max()) <= 0.5


def quarter_turn(size: tuple[int, ...], axis: int) -> torch.Tensor:
    angles = torch.zeros(1, 1 if len(size) == 2 else 3)
    angles[0, axis] = torch.pi / 2
    flat = torch.zeros(1, len(size), len(size))
    return warp.matrices(angles, torch.ones(1, len(size)), flat)


@pytest.mark.parametrize(("size", "axis", "plane"), [((5, 5), 0, (2, 3)), ((5, 4, 5), 1, (2, 4))])
def test_a_turn_by_90_degrees_moves_voxels_onto_voxels(size, axis, plane) -> None:
    x = torch.randn(1, 1, *size, generator=generator())
    grid = warp.affine_grid(quarter_turn(size, axis), torch.zeros(1, len(size)), size)
    moved, _ = warp.sample(x, None, grid)
    either = [torch.rot90(x, k, plane) for k in (1, 3)]
    assert any(torch.allclose(moved, e, atol=1e-5) for e in either)


def test_shift_and_enlargement_by_hand() -> None:
    line = torch.arange(5.0).reshape(1, 1, 1, 5)
    still = warp.matrices(torch.zeros(1, 1), torch.ones(1, 2), torch.zeros(1, 2, 2))
    right = warp.affine_grid(still, torch.tensor([[0.0, 1.0]]), (1, 5))
    assert warp.sample(line, None, right)[0].flatten().tolist() == [0, 0, 1, 2, 3]
    double = warp.matrices(torch.zeros(1, 1), torch.full((1, 2), 2.0), torch.zeros(1, 2, 2))
    grown = warp.affine_grid(double, torch.zeros(1, 2), (1, 5))
    assert warp.sample(line, None, grown)[0].flatten().tolist() == pytest.approx(
        [1, 1.5, 2, 2.5, 3]
    )


def test_blur_matches_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    x = torch.randn(2, 1, 12, 11, generator=generator())
    found = warp.blur(x, torch.tensor([1.0, 1.0]), 1.0)
    for record in range(2):
        expected = gaussian_filter(x[record, 0].numpy(), 1.0, mode="nearest", radius=3)
        np.testing.assert_allclose(found[record, 0].numpy(), expected, atol=1e-5)


def test_faults_name_transform_and_option(make_study) -> None:
    study = make_study("cnn", augment=[{"name": "flop"}, {"name": "zoom", "options": {"by": 1}}])
    with pytest.raises(ConfigError) as caught:
        augmentations(study)
    assert "training.augment.0.name: there is no augmentation 'flop'" in caught.value.faults[0]
    assert "training.augment.1.options.by" in caught.value.faults[1]
    with pytest.raises(ConfigError, match="images only"):
        augmentations(make_study(features=2, augment=[{"name": "flip"}]))
