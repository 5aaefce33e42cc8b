"""The catalogue of networks: options, determinism, start weights, fitness for privacy."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medfl.client.training.loop import train
from medfl.client.training.plan import TrainPlan
from medfl.client.training.predict import predict
from medfl.common import tensors
from medfl.common.errors import ConfigError, FederationError, StorageError
from medfl.common.models import MODELS, build_model, model_faults
from medfl.common.models.dp_fit import dp_fit
from medfl.common.models.norms import groups_for, has_batch_norm, normalisation_names
from medfl.common.models.weights import get_weights, set_weights
from medfl.common.statistics import Shared

SHARED, PRIVATE = Shared(), Shared(private=True)
SCORES = [name for name, entry in MODELS.items() if entry.output == "scores"]
MASKS = [name for name, entry in MODELS.items() if entry.output == "masks"]


def study_for(name: str, make_study, dimensions: int = 2):
    segments = MODELS[name].output == "masks"
    side = 32 if name.startswith(("densenet", "basic")) else 16
    return make_study(
        name,
        [side] * dimensions,
        kind="segmentation" if segments else "classification",
        classes=3 if segments else 2,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_model_gives_one_logit_or_one_channel_a_class(name, dimensions, make_study) -> None:
    study = study_for(name, make_study, dimensions)
    model = build_model(study, SHARED, seed=1).eval()
    side = study.image.size[0]
    with torch.no_grad():
        out = model(torch.zeros(2, 1, *study.image.size))
    masks = MODELS[name].output == "masks"
    assert out.shape == ((2, 3, *[side] * dimensions) if masks else (2, 1))


def test_three_classes_have_three_logits_and_labels_have_one_each(make_study) -> None:
    three = build_model(make_study("cnn", classes=3), SHARED, seed=0)
    labels = build_model(make_study("cnn", multi_label=True, classes=2), SHARED, seed=0)
    assert three(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    assert labels(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


def test_the_textbook_network_has_the_textbook_number_of_weights(make_study) -> None:
    model = build_model(make_study("cnn", [28, 28]), SHARED, seed=0)
    convolutions = (9 * 1 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    dense = (128 * 3 * 3 + 1) * 512 + (512 + 1)
    assert sum(p.numel() for p in model.parameters()) == convolutions + dense


@pytest.mark.parametrize("size", [[1, 1], [3, 5], [2, 9, 4]])
def test_the_small_network_takes_any_size(size, make_study) -> None:
    model = build_model(make_study("cnn", size), SHARED, seed=0)
    assert model(torch.zeros(1, 1, *size)).shape == (1, 1)


def test_logistic_regression_starts_at_zero_unless_asked_otherwise(make_study) -> None:
    zero = build_model(make_study(features=3), SHARED, n_features=5, seed=0)
    random = build_model(
        make_study(features=3, options={"zero_init": False}), SHARED, n_features=5, seed=0
    )
    assert [float(p.detach().abs().sum()) for p in zero.parameters()] == [0, 0]
    assert float(next(random.parameters()).detach().abs().sum()) > 0


def test_the_same_seed_gives_the_same_weights_and_leaves_torch_alone(make_study) -> None:
    study = make_study("cnn")
    before = torch.random.get_rng_state()
    first = get_weights(build_model(study, SHARED, seed=7))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again = get_weights(build_model(study, SHARED, seed=7))
    other = get_weights(build_model(study, SHARED, seed=8))
    assert tensors.digest(first) == tensors.digest(again) != tensors.digest(other)


def test_an_unknown_model_or_option_is_named_with_what_exists(make_study) -> None:
    with pytest.raises(ConfigError, match=r"no model 'cnnn'.*densenet121"):
        build_model(make_study("cnnn"), SHARED, seed=0)
    with pytest.raises(ConfigError, match=r"model.options.chanels.*did you mean channels"):
        build_model(make_study("cnn", options={"chanels": [8]}), SHARED, seed=0)
    with pytest.raises(ConfigError, match=r"model.options.dense: must be a whole number"):
        build_model(make_study("cnn", options={"dense": "512"}), SHARED, seed=0)
    assert "unet" in model_faults(make_study("cnn", kind="segmentation"))[0]
    assert "logistic" in model_faults(make_study("cnn", features=2))[0]
    assert model_faults(make_study("cnn", options={"channels": [4], "norm": "group"})) == []


def test_a_size_the_network_cannot_take_is_refused_before_training(make_study) -> None:
    with pytest.raises(ConfigError, match=r"image.size: unet"):
        build_model(make_study("unet", [20, 20], "segmentation", 3), SHARED, seed=0)
    with pytest.raises(ConfigError, match=r"image.size: densenet121.*stem"):
        build_model(make_study("densenet121", [28, 28]), SHARED, seed=0)
    small = make_study("densenet121", [28, 28], options={"stem": "small"})
    assert build_model(small, SHARED, seed=0)(torch.zeros(1, 1, 28, 28)).shape == (1, 1)


def test_batch_norm_is_there_only_when_asked_for(make_study) -> None:
    plain = build_model(study_for("resnet10", make_study), SHARED, seed=0)
    asked = make_study("resnet10", [16, 16], options={"norm": "batch"})
    assert not has_batch_norm(plain)
    assert has_batch_norm(build_model(asked, SHARED, seed=0))
    assert not has_batch_norm(build_model(asked, PRIVATE, seed=0))


def test_normalisation_layers_are_named_with_their_running_statistics(make_study) -> None:
    batch = build_model(
        make_study("cnn", options={"channels": [4], "norm": "batch"}), SHARED, seed=0
    )
    assert normalisation_names(batch) == [
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    group = build_model(
        make_study("cnn", options={"channels": [4], "norm": "group"}), SHARED, seed=0
    )
    assert normalisation_names(group) == ["1.weight", "1.bias"]
    assert normalisation_names(build_model(make_study("cnn"), SHARED, seed=0)) == []


def test_groups_divide_the_channels_and_hold_four_where_possible() -> None:
    assert [groups_for(c) for c in (1, 3, 8, 12, 64, 128, 1024)] == [1, 1, 2, 3, 16, 32, 32]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_fit_for_privacy_treats_each_record_alone(name, make_study) -> None:
    study = study_for(name, make_study)
    model = build_model(study, PRIVATE, seed=0)
    assert not has_batch_norm(model)
    assert not any(getattr(layer, "inplace", False) for layer in model.modules())
    assert not any("running" in key for key in model.state_dict())
    x = torch.randn(3, 1, *study.image.size, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[1:] = 5.0
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], model(changed)[0], atol=1e-4, rtol=1e-3)


def test_a_layer_that_mixes_records_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="differential privacy"):
        dp_fit(nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)))


def test_weights_travel_as_copies_and_return_exactly(make_study) -> None:
    study = make_study("resnet10", [16, 16], options={"norm": "batch"})
    source, target = (build_model(study, SHARED, seed=s) for s in (1, 2))
    weights = get_weights(source)
    kept = tensors.digest(weights)
    with torch.no_grad():
        next(source.parameters()).add_(1)
    assert tensors.digest(weights) == kept
    set_weights(target, weights)
    assert tensors.digest(get_weights(target)) == kept
    assert weights["bn1.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize("name", [n for n, e in MODELS.items() if e.channels_last])
def test_a_network_with_its_channels_last_learns_what_one_with_them_first_does(
    name, make_study, make_cases, monkeypatch
) -> None:
    # Group norm: batch norm over cases of nearly one value would multiply the rounding.
    options = {} if name == "cnn" else {"norm": "group"}
    study = make_study(name, [32, 32], options=options, batch_size=8, learning_rate=0.01)
    cases, found = make_cases(study=study, n=8), []
    for last in (True, False):
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], channels_last=last))
        model = build_model(study, SHARED, seed=1)
        assert any(not p.is_contiguous() for p in model.parameters()) == last
        start = get_weights(model)
        train(model, cases, study, SHARED, TrainPlan(1, 1, seed=3))
        found.append((start, get_weights(model), next(predict(model, cases, study, "cpu"))))
    (start, after, said), (other_start, other_after, other_said) = found
    # Weights travel as plain arrays, whatever the order in memory here.
    assert all(a.flags.c_contiguous for a in after.values())
    assert tensors.digest(start) == tensors.digest(other_start)
    assert tensors.digest(start) != tensors.digest(after)
    for key, array in after.items():
        moved = np.abs(other_after[key] - start[key]).max()
        np.testing.assert_allclose(array, other_after[key], atol=1e-3 * moved + 1e-7)
    np.testing.assert_allclose(said, other_said, atol=1e-5)


def test_under_privacy_the_channels_stay_first(make_study) -> None:
    model = build_model(make_study("cnn", [16, 16]), PRIVATE, seed=1)
    assert all(p.is_contiguous() for p in model.parameters())


def test_weights_that_do_not_fit_are_refused_and_change_nothing(make_study) -> None:
    model = build_model(make_study(features=2), SHARED, n_features=2, seed=0)
    weights = get_weights(model)
    with pytest.raises(FederationError, match=r"missing 1\.bias"):
        set_weights(model, {"1.weight": weights["1.weight"]})
    wrong = {"1.bias": weights["1.bias"] + 1, "1.weight": np.ones((1, 3), np.float32)}
    with pytest.raises(FederationError, match=r"1\.weight has shape"):
        set_weights(model, wrong)
    with pytest.raises(FederationError, match="int64"):
        set_weights(model, {**weights, "1.bias": np.ones(1, np.int64)})
    assert tensors.digest(get_weights(model)) == tensors.digest(weights)


def started(path: Path, digest: str, make_study, **more):
    model = {"start_weights": str(path), "start_weights_sha256": digest, **more}
    return make_study("mlp", features=2, options={"hidden": [4]}, more_model=model)


def test_start_weights_are_taken_and_layers_the_file_lacks_keep_their_start(
    tmp_path, make_study
) -> None:
    path = tmp_path / "start.safetensors"
    tensors.save({"1.weight": np.full((4, 2), 3, np.float32)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = build_model(started(path, digest, make_study), SHARED, n_features=2, seed=5)
    plain = make_study("mlp", features=2, options={"hidden": [4]})
    seeded = build_model(plain, SHARED, n_features=2, seed=5)
    assert get_weights(model)["1.weight"].tolist() == [[3, 3]] * 4
    assert np.array_equal(get_weights(model)["3.weight"], get_weights(seeded)["3.weight"])


def test_start_weights_other_than_agreed_are_refused(tmp_path, make_study) -> None:
    path = tmp_path / "start.safetensors"
    tensors.save({"1.weight": np.zeros((4, 3), np.float32)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match="the study agreed"):
        build_model(started(path, "0" * 64, make_study), SHARED, n_features=2, seed=0)
    with pytest.raises(ConfigError, match=r"1\.weight has shape"):
        build_model(started(path, digest, make_study), SHARED, n_features=2, seed=0)
    with pytest.raises(StorageError, match="no such file"):
        build_model(started(tmp_path / "no", digest, make_study), SHARED, n_features=2, seed=0)


def test_frozen_layers_are_named_by_how_they_begin(make_study) -> None:
    model = build_model(
        make_study("mlp", features=2, more_model={"freeze": ["1."]}), SHARED, n_features=2, seed=0
    )
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["1.weight", "1.bias"]
    for prefix, why in (("nothing", "no parameter begins"), ("", "nothing to train")):
        study = make_study("mlp", features=2, more_model={"freeze": [prefix]})
        with pytest.raises(ConfigError, match=why):
            build_model(study, SHARED, n_features=2, seed=0)
