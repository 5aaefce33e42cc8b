"""From a picture as read to the network's input, the same at every hospital."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data import resample
from medfl.client.data.cases import Picture
from medfl.client.data.mask_values import class_mask
from medfl.client.data.space import check_upright, onto
from medfl.common.errors import CaseError
from medfl.common.study import ImageInput, Study

Floats = NDArray[np.float32]
Mask = NDArray[np.uint8]

# ITU-R BT.601 luma, as PIL and most viewers turn colours to grey.
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# Of one resampled case, all channels: 2 GiB as float32, four times a whole body in cubes of 1 mm.
MOST_NUMBERS = 2**29


@dataclass(frozen=True, slots=True)
class Facts:
    """What a picture was before preparation, for the hospital's own check.

    size: spatial shape; spacing_mm: () where unknown; low, median, high: 0.5, 50 and 99.5
    percentile of the stored values.
    """

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True)
class Prepared:
    """image: float32 (C, *spatial); mask: uint8 class numbers (*spatial), or None."""

    image: Floats
    mask: Mask | None
    facts: Facts


def prepare(image: Picture, mask: Picture | None, study: Study) -> Prepared:
    """Orient, resample, scale the intensities and fit one case by the study's [image] table.

    `federated` intensities stay as stored: their mean and sd come from the prepare exchange.

    Raises:
        CaseError: with the reason why this case cannot be used.
    """
    rule = study.image
    if rule is None:
        raise CaseError("no_image")
    _check_dimensions(image, rule)
    pixels = _as_floats(image.array)
    _check_contrast(_inside(pixels, image))
    facts = _facts(image, pixels)
    image = replace(image, array=_with_channels(pixels, rule.channels))
    image = _turned_without_padding(image, rule)
    inside = None if image.outside is None else _inside(image.array, image)
    if mask is not None:
        mask = replace(mask, array=class_mask(mask, study.task))
    if mask is not None:
        mask = onto(mask, image, rule.dimensions, "mask_geometry")
    if rule.dimensions == 3:
        if image.affine is not None:
            check_upright(image.affine, image.array.shape[1:])
        image = _oriented(image, rule.orientation, first_axis=1)
        mask = None if mask is None else _oriented(mask, rule.orientation, first_axis=0)
    values, classes = _resampled(image, mask, rule)
    values = _scaled(values, values if inside is None else inside, rule)
    return Prepared(*_fitted(values, classes, rule), facts)


def _check_dimensions(image: Picture, rule: ImageInput) -> None:
    spatial = image.array.ndim - 1
    if spatial != rule.dimensions:
        raise CaseError("dimensions", f"{spatial} instead of {rule.dimensions}")
    if 0 in image.array.shape:
        raise CaseError("empty_image", f"its shape is {image.array.shape}")


def _as_floats(array: NDArray[np.generic]) -> Floats:
    with np.errstate(over="ignore"):
        pixels = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise CaseError("nan_values")
    return pixels


def _turned_without_padding(image: Picture, rule: ImageInput) -> Picture:
    """A bright background turned over here already, where padding must not become bright by it."""
    if image.outside is None or not rule.dark_background:
        return image
    inside = _inside(image.array, image)
    low, high = inside.min(), inside.max()
    if np.median(inside) <= (low + high) / 2:
        return image
    return replace(image, array=np.where(image.outside, low, low + high - image.array))


def _inside(pixels: NDArray[Any], image: Picture) -> NDArray[Any]:
    """The same without padding, as (C, n) where there is any."""
    return pixels if image.outside is None else pixels[:, ~image.outside]


def _check_contrast(inside: Floats) -> None:
    if not inside.size or inside.min() == inside.max():
        raise CaseError("empty_image")


def _facts(image: Picture, pixels: Floats) -> Facts:
    # Every k-th value is enough for a summary; percentiles of a whole CT would cost a second.
    sample = _inside(pixels, image).ravel()
    sample = sample[:: max(1, sample.size // 100_000)]
    # As np.percentile does, in a fifth of its time, which is most of a small picture's.
    places = np.array((0.005, 0.5, 0.995)) * (sample.size - 1)
    low, median, high = np.interp(places, np.arange(sample.size), np.sort(sample)).tolist()
    return Facts(pixels.shape[1:], image.spacing_mm or (), low, median, high)


def _with_channels(pixels: Floats, channels: int) -> Floats:
    """Colours to grey by luminance, grey to colours by repetition. Raises CaseError("channels")."""
    found = pixels.shape[0]
    if found == channels:
        return pixels
    if channels == 1 and found == 3:
        return np.tensordot(_LUMINANCE, pixels, axes=(0, 0))[np.newaxis].astype(np.float32)
    if channels == 3 and found == 1:
        return np.repeat(pixels, 3, axis=0)
    raise CaseError("channels", f"{found} instead of {channels}")


def _oriented(picture: Picture, letters: str, *, first_axis: int) -> Picture:
    """Turn the spatial axes (from `first_axis` on) to `letters`, such as RAS; no interpolation."""
    if picture.affine is None:
        return picture
    turns: Any = importlib.import_module("nibabel.orientations")
    now = turns.io_orientation(picture.affine)
    if np.isnan(now).any():
        raise CaseError("bad_affine")
    turn = turns.ornt_transform(now, turns.axcodes2ornt(tuple(letters)))
    shape = picture.array.shape[first_axis:]
    layers = [picture.array] if first_axis == 0 else list(picture.array)
    turned = [np.ascontiguousarray(turns.apply_orientation(layer, turn)) for layer in layers]
    order = np.argsort(turn[:, 0])
    spacing = picture.spacing_mm
    return Picture(
        turned[0] if first_axis == 0 else np.stack(turned),
        picture.affine @ turns.inv_ornt_aff(turn, shape),
        None if spacing is None else tuple(spacing[int(i)] for i in order),
    )


def _resampled(
    image: Picture, mask: Picture | None, rule: ImageInput
) -> tuple[Floats, Mask | None]:
    values: Floats = image.array.astype(np.float32, copy=False)
    classes = None if mask is None else mask.array.astype(np.uint8, copy=False)
    if rule.spacing_mm is None:
        return values, classes
    if image.spacing_mm is None:
        raise CaseError("no_spacing")
    size = [
        max(1, round(n * have / want))
        for n, have, want in zip(values.shape[1:], image.spacing_mm, rule.spacing_mm, strict=True)
    ]
    _refuse_endless(values.shape, size)
    return resample.linear(values, size), None if classes is None else resample.nearest(
        classes, size
    )


def _refuse_endless(shape: Sequence[int], size: Sequence[int]) -> None:
    """Before any memory is taken. shape: (C, *spatial) as read; size: what it would become.

    One axis is resampled after the other, so that an array on the way may be larger than both.
    """
    most = math.prod(max(pair) for pair in zip(shape[1:], size, strict=True)) * shape[0]
    if most > MOST_NUMBERS:
        raise CaseError(
            "implausible_spacing", " × ".join(map(str, size)) + " at the study's spacing"
        )


def _scaled(values: Floats, inside: Floats, rule: ImageInput) -> Floats:
    """Intensities by the study's rule, from the whole image, before any border is added.

    inside: (C, ...) the values that count: all of them, but for padding.
    """
    low, high = inside.min(), inside.max()
    if rule.dark_background and np.median(inside) > (low + high) / 2:
        values, inside = (low + high) - values, (low + high) - inside
    if rule.intensity == "zscore":
        # Channel by channel; float64 sums, or a large volume's mean would drift.
        axes, shape = tuple(range(1, inside.ndim)), (-1,) + (1,) * (values.ndim - 1)
        mean = inside.mean(axis=axes, dtype=np.float64).reshape(shape)
        sd = inside.std(axis=axes, dtype=np.float64).reshape(shape)
        return np.asarray((values - mean) / np.maximum(sd, 1e-6), dtype=np.float32)
    if rule.intensity == "range" and rule.window is not None:
        return _to_unit(values, *rule.window)
    if rule.intensity == "percentiles":
        bottom, top = (float(v) for v in np.percentile(inside, (0.5, 99.5)))
        return _to_unit(values, bottom, top) if top > bottom else _to_unit(values, low, high)
    return values


def _to_unit(values: Floats, low: float, high: float) -> Floats:
    return np.asarray(np.clip((values - low) / (high - low), 0, 1), dtype=np.float32)


def _fitted(values: Floats, classes: Mask | None, rule: ImageInput) -> tuple[Floats, Mask | None]:
    if rule.fit == "keep":
        return values, classes
    if rule.fit == "resize":
        scaled = resample.linear(values, rule.size)
        return scaled, None if classes is None else resample.nearest(classes, rule.size)
    # The border takes the image's darkest value: air in CT and MR, black in an X-ray.
    image = np.stack([centred(channel, rule.size, channel.min()) for channel in values])
    return image, None if classes is None else centred(classes, rule.size, 0)


def centred(array: NDArray[np.generic], size: Sequence[int], border: float | np.generic) -> NDArray:  # type: ignore[type-arg]
    """Crop or pad every axis to `size` about the middle; an odd voxel goes to the end."""
    result = np.full(tuple(size), border, dtype=array.dtype)
    source, target = [], []
    for have, want in zip(array.shape, size, strict=True):
        shared = min(have, want)
        source.append(slice((have - shared) // 2, (have - shared) // 2 + shared))
        target.append(slice((want - shared) // 2, (want - shared) // 2 + shared))
    result[tuple(target)] = array[tuple(source)]
    return result
