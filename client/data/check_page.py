"""The check as a page for the hospital: one file, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import Cohort
from medfl.client.data.check import SPLITS, Checked, text_of
from medfl.common.pictures import upright
from medfl.common.study import Study

# Okabe and Ito's colours, which colour-blind readers tell apart; class 0 is never drawn.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167))
_SHOWN = 8
_PIXELS = 220

Rgb = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shown:
    """One case of the page: its keyed hash, its class or "", and what each picture of it shows
    (which channel, "" where there is one) with a PNG data URI."""

    key: str
    label: str
    pictures: tuple[tuple[str, str], ...]


def page(checked: Checked, study: Study) -> str:
    """HTML of the whole check, with pictures of a few cases as the network will see them."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["range"] = text_of
    text = files("medfl.client.data").joinpath("check_page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        result=checked.result,
        study=study,
        splits=SPLITS,
        segmentation=study.task.kind == "segmentation",
        pictures=shown(checked.cohort, study),
        colours=[
            (name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(study.task.classes[1:])
        ],
    )


def shown(cohort: Cohort, study: Study) -> list[Shown]:
    """A few cases spread evenly over the cohort, which is in the order of keyed hashes."""
    if study.image is None or not cohort.cases:
        return []
    count = min(_SHOWN, len(cohort.cases))
    chosen = np.linspace(0, len(cohort.cases) - 1, count).astype(int)
    return [_shown(cohort, study, int(i)) for i in chosen]


def _shown(cohort: Cohort, study: Study, index: int) -> Shown:
    image = np.asarray(cohort.inputs[index], dtype=np.float32)
    mask: NDArray[np.generic] | None = None
    label = ""
    if study.task.kind == "segmentation":
        mask = np.asarray(cohort.targets[index])
    elif study.task.multi_label:
        row = np.asarray(cohort.targets[index])
        label = ", ".join(c for c, on in zip(study.task.classes, row, strict=True) if on)
    else:
        label = study.task.classes[int(np.asarray(cohort.targets)[index])]
    drawn = pictures(image, mask, study.image.orientation if study.image else None)
    return Shown(
        cohort.cases[index].key[:8], label, tuple((name, _uri(rgb)) for name, rgb in drawn)
    )


def pictures(
    image: NDArray[np.float32], mask: NDArray[np.generic] | None, orientation: str | None
) -> list[tuple[str, Rgb]]:
    """(C, *spatial) -> every channel as (H, W, 3), and its name where there are several.

    The middle slice or the one with most mask, with contours of the mask over each channel, so that
    a channel of another place is seen. Three channels in 2-D are shown as colours, too.
    orientation: of a volume's axes; its slices are shown as radiologists see them.
    """
    flat = image.ndim == 3
    if image.ndim == 4:
        middle = image.shape[3] // 2
        if mask is not None and mask.any():
            middle = int((mask > 0).sum(axis=(0, 1)).argmax())  # type: ignore[operator]
        image = np.stack([upright(channel[..., middle], orientation) for channel in image])
        mask = None if mask is None else upright(mask[..., middle], orientation)
    found = [("colours", _rgb(image, mask))] if flat and len(image) == 3 else []
    for number, channel in enumerate(image, start=1):
        name = f"channel {number}" if len(image) > 1 else ""
        found.append((name, _rgb(np.repeat(channel[np.newaxis], 3, axis=0), mask)))
    return found


def _rgb(image: NDArray[np.float32], mask: NDArray[np.generic] | None) -> Rgb:
    """(3, H, W) in one range of values -> (H, W, 3), enlarged, with contours."""
    low, high = np.percentile(image, (0.5, 99.5))
    colours = np.clip((image - low) / max(float(high - low), 1e-6) * 255, 0, 255).astype(np.uint8)
    factor = max(1, _PIXELS // max(colours.shape[1:]))
    rgb = np.ascontiguousarray(colours.transpose(1, 2, 0)).repeat(factor, 0).repeat(factor, 1)
    if mask is not None:
        _draw_contours(rgb, mask.repeat(factor, 0).repeat(factor, 1))
    return rgb


def _draw_contours(rgb: Rgb, mask: NDArray[np.generic]) -> None:
    """Colour every pixel of a class that touches another class."""
    for number in np.unique(mask):
        if number == 0:
            continue
        inside = np.pad(mask == number, 1)
        core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        edge = inside[1:-1, 1:-1] & ~core
        rgb[edge] = COLOURS[(int(number) - 1) % len(COLOURS)]


def _uri(rgb: Rgb) -> str:
    from PIL import Image

    image = Image.fromarray(rgb)
    image.thumbnail((2 * _PIXELS, 2 * _PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
