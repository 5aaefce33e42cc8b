"""The catalogue of networks. A new one: a file with `build`, one line in MODELS, one test."""

from __future__ import annotations

import hashlib
import logging
import math
from typing import TYPE_CHECKING

from medfl.common import tensors
from medfl.common.errors import ConfigError
from medfl.common.models import (
    attention_unet,
    basic_unet,
    cnn,
    densenet,
    logistic,
    mlp,
    resnet,
    segresnet,
    strided_cnn,
    unet,
)
from medfl.common.models.entry import ModelEntry, Shape, shape_of
from medfl.common.models.weights import fit_fault
from medfl.common.options import checked_options

if TYPE_CHECKING:
    from torch import nn

    from medfl.common.statistics import Shared
    from medfl.common.study import Model, Study

log = logging.getLogger(__name__)

# Numbers of two cases that a network is tried on in a few milliseconds: 2 x 64 x 64.
_SMALL = 2**13

# Channels last where a step is faster by it: 0.6 of the time for the small CNN, because torch's max
# pooling uses the processor's vectors in this order alone; 0.84 to 0.94 for the ResNets (one core,
# 64 pixels a side). DenseNet121's whole runs gain nothing, the U-Nets' steps take 0.88 to 1.16, 3-D
# 0.96 to 1.12. Not under differential privacy, whose engine folds a batch's records into channels.
_NETS = "monai.networks.nets."
MODELS: dict[str, ModelEntry] = {
    "logistic": ModelEntry(logistic.build, ("image", "record"), "scores"),
    "mlp": ModelEntry(mlp.build, ("image", "record"), "scores"),
    "cnn": ModelEntry(cnn.build, ("image",), "scores", channels_last=True),
    "strided_cnn": ModelEntry(strided_cnn.build, ("image",), "scores"),
    "densenet": ModelEntry(densenet.build, ("image",), "scores", needs=_NETS + "densenet"),
    "densenet121": ModelEntry(densenet.build_121, ("image",), "scores", needs=_NETS + "densenet"),
    "resnet10": ModelEntry(
        resnet.build_10, ("image",), "scores", channels_last=True, needs=_NETS + "resnet"
    ),
    "resnet18": ModelEntry(
        resnet.build_18, ("image",), "scores", channels_last=True, needs=_NETS + "resnet"
    ),
    "resnet34": ModelEntry(
        resnet.build_34, ("image",), "scores", channels_last=True, needs=_NETS + "resnet"
    ),
    "resnet50": ModelEntry(
        resnet.build_50, ("image",), "scores", channels_last=True, needs=_NETS + "resnet"
    ),
    "unet": ModelEntry(unet.build, ("image",), "masks", needs=_NETS + "unet"),
    "basic_unet": ModelEntry(basic_unet.build, ("image",), "masks", needs=_NETS + "basic_unet"),
    "segresnet": ModelEntry(segresnet.build, ("image",), "masks", needs=_NETS + "segresnet"),
    "attention_unet": ModelEntry(
        attention_unet.build, ("image",), "masks", needs=_NETS + "attentionunet"
    ),
}

# Every one passes tests of per-record gradients against one backward pass a record.
DP_MODELS = tuple(MODELS)


def model_faults(study: Study) -> list[str]:
    """What is wrong with the study's [model] table, one line each; builds nothing."""
    try:
        checked_options(_entry(study).build, study.model.options, "model.options")
    except ConfigError as error:
        return error.faults
    return []


def build_model(
    study: Study, shared: Shared, *, n_features: int | None = None, seed: int
) -> nn.Module:
    """The study's network with the same start weights wherever it is built from the same seed.

    n_features: numbers a record after encoding; record studies only. Torch's own random state is
    left as it was. Where any hospital trains privately, everybody gets the network without batch
    norm, because all must have the same one.

    Raises:
        ConfigError: unknown model or option, an image size the network cannot take, start
            weights that are not the agreed ones, a `freeze` that names nothing.
        StorageError: the start weights cannot be read.
    """
    import torch

    from medfl.common.models.dp_fit import dp_fit

    entry, shape = _entry(study), shape_of(study, n_features)
    options = checked_options(entry.build, study.model.options, "model.options")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also seed the accelerators, which nobody restores.
        torch.default_generator.manual_seed(seed)
        module = entry.build(shape, **options)
        if shared.private:
            module = dp_fit(module)
        _check_size(module, shape, study)
    _load_start(module, study.model)
    _freeze(module, study.model.freeze)
    if entry.channels_last and shape.dimensions == 2 and not shared.private:
        # Activations follow the weights.
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.train()


def _entry(study: Study) -> ModelEntry:
    entry = MODELS.get(study.model.name)
    if entry is None:
        raise ConfigError(
            f"model.name: there is no model {study.model.name!r}; use one of {', '.join(MODELS)}"
        )
    given = "image" if study.image is not None else "record"
    wanted = "masks" if study.task.kind == "segmentation" else "scores"
    if given not in entry.inputs or wanted != entry.output:
        fitting = [n for n, e in MODELS.items() if given in e.inputs and e.output == wanted]
        raise ConfigError(
            f"model.name: {study.model.name!r} does not turn {given}s into {wanted}; "
            f"use one of {', '.join(fitting)}"
        )
    return entry


def _check_size(module: nn.Module, shape: Shape, study: Study) -> None:
    """Try two cases of the study's size, large ones where nothing is computed."""
    import torch

    cases = (2, shape.channels, *shape.size) if shape.channels else (2, *shape.size)
    # The meta device computes nothing, but imports for a second and a half when first used.
    device = "cpu" if math.prod(cases) <= _SMALL else "meta"
    weights = {name: t.to(device, copy=True) for name, t in module.state_dict().items()}
    try:
        with torch.no_grad():
            out = torch.func.functional_call(
                module, weights, (torch.zeros(cases, device=device),), strict=True
            )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"image.size: {study.model.name} cannot take {list(shape.size)} ({reason}); choose "
            'sizes divisible by its strides, fewer levels, or model.options.stem = "small"'
        ) from None
    masks = study.task.kind == "segmentation"
    wanted = (2, shape.outputs, *shape.size) if masks else (2, shape.outputs)
    if tuple(out.shape) != wanted:
        raise ConfigError(
            f"image.size: {study.model.name} turns {list(shape.size)} into {list(out.shape[2:])}; "
            "choose sizes divisible by its strides"
        )


def _load_start(module: nn.Module, model: Model) -> None:
    """Copy the start weights; layers that the file lacks keep their seeded start."""
    import torch

    if model.start_weights is None:
        return
    found = tensors.load(model.start_weights)
    digest = hashlib.sha256(model.start_weights.read_bytes()).hexdigest()
    if digest != model.start_weights_sha256:
        raise ConfigError(
            f"model.start_weights: {model.start_weights} has SHA-256 {digest}, the study agreed "
            f"on {model.start_weights_sha256}; get the agreed file"
        )
    own = module.state_dict()
    for name, array in found.items():
        fault = fit_fault(own[name], array) if name in own else "is not in the model"
        if fault:
            raise ConfigError(
                f"model.start_weights: {name} {fault}; choose the model the file was made with, "
                "or leave that layer out of the file"
            )
    with torch.no_grad():
        for name, array in found.items():
            own[name].copy_(torch.from_numpy(array))
    log.info("start weights: %d of %d tensors from the file", len(found), len(own))


def _freeze(module: nn.Module, prefixes: tuple[str, ...]) -> None:
    parameters = dict(module.named_parameters())
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in parameters):
            raise ConfigError(
                f"model.freeze: no parameter begins with {prefix!r}; some are "
                f"{', '.join(list(parameters)[:5])}"
            )
    for name, parameter in parameters.items():
        if prefixes and name.startswith(prefixes):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ConfigError("model.freeze: leaves nothing to train; name fewer layers")
