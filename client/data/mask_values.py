"""From what a mask file stores, numbers or colours, to the study's class numbers, once.

The study's `label_map` comes first, before any threshold; a number that it does not name is a
class by its name or number. What could mean two things is left out and named.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import Picture
from medfl.common.errors import CaseError
from medfl.common.study import Task

Classes = NDArray[np.uint8]

# What a resampling tool or a scale in the header leaves of a whole number: 0.99999, 1.0000001.
_NEAR = 1e-3
_WHITE = (255, 65535)
_SHOWN = 5
_COLOUR = re.compile(r"^#([0-9a-fA-F]{6})$|^\(?(\d{1,3})[, ]+(\d{1,3})[, ]+(\d{1,3})\)?$")


def class_mask(mask: Picture, task: Task) -> Classes:
    """A mask as read, as class numbers. Raises CaseError("mask_values")."""
    if not mask.classed:
        return classes_of(mask.array, task)
    numbers = mask.array.astype(np.uint8)
    if numbers.size and int(numbers.max()) >= len(task.classes):
        raise CaseError("mask_values", f"the class number {int(numbers.max())}")
    return numbers


def classes_of(values: NDArray[np.generic], task: Task, *, objects: bool = False) -> Classes:
    """A mask's stored values as class numbers.

    With two classes and no map, 0 and 255 are background and foreground. objects: so are 0 and
    1..n, the numbers of single objects, unless white is among them: then it is a grey picture.

    Raises:
        CaseError: "mask_values".
    """
    plain = values.astype(np.uint8) if values.dtype.kind == "b" else values
    found, places = np.unique(plain, return_inverse=True)
    if plain.dtype.kind not in "iuf" or not np.isfinite(found.astype(np.float64)).all():
        raise CaseError("mask_values", "values that are no numbers")
    whole = np.rint(found.astype(np.float64))
    whole[np.abs(found - whole) > _NEAR] = np.nan
    numbers = [
        _class_of(float(v), float(w), task) for v, w in zip(found[:256], whole, strict=False)
    ]
    unknown = [v for v, n in zip(found, numbers, strict=False) if n is None] or [*found[256:]]
    if not unknown:
        return np.array(numbers, dtype=np.uint8)[places].reshape(values.shape)
    if len(task.classes) != 2 or _by_number(task) or not (whole >= 0).all():
        raise CaseError("mask_values", _shown("value", [_text(v) for v in unknown]))
    above = {int(w) for w in whole if w > 0}
    if above not in [{w} for w in _WHITE] and (not objects or above & {*_WHITE}):
        texts = _shown("value", [_text(v) for v in unknown])
        grey = " (a grey picture? `label_map` says what each value means)"
        raise CaseError("mask_values", texts + (grey if above & {*_WHITE} else ""))
    return (plain > 0.5).astype(np.uint8)  # type: ignore[operator]


def _class_of(value: float, whole: float, task: Task) -> int | None:
    """By the map, else by a class that is named so, else by the class's number."""
    mapped = _by_number(task)
    named = mapped.get(value, mapped.get(whole))
    if named is not None:
        return task.classes.index(named)
    for number, name in enumerate(task.classes):
        if _number(name) == whole:
            return number
    return int(whole) if 0 <= whole < len(task.classes) else None


def _by_number(task: Task) -> dict[float, str]:
    """The map's keys that are numbers."""
    keys = {_number(key): name for key, name in (task.label_map or {}).items()}
    return {key: name for key, name in keys.items() if key is not None}


def _number(text: str) -> float | None:
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def classes_of_colours(
    colours: NDArray[np.generic], task: Task, indices: NDArray[np.generic] | None = None
) -> Classes:
    """A coloured mask, (rows, columns, 3) of 0..255, as class numbers.

    `label_map` may name colours (`"#ff0000"` or `"255, 0, 0"`). Else, with two classes, black is
    background and the one other colour is foreground. indices: a palette's, which count where
    nothing else speaks; None where there is none, or where its first colour is not black, so
    that the file's order of colours is no order of classes.

    Raises:
        CaseError: "mask_values".
    """
    wide = colours.astype(np.int64)
    packed = (wide[..., 0] << 16) + (wide[..., 1] << 8) + wide[..., 2]
    found, places = np.unique(packed, return_inverse=True)
    mapped = _by_colour(task)
    unknown = [f"#{int(c):06x}" for c in found if int(c) not in mapped]
    if not unknown:
        numbers = [task.classes.index(mapped[int(c)]) for c in found]
        return np.array(numbers, dtype=np.uint8)[places].reshape(packed.shape)
    if not mapped and len(task.classes) == 2 and len(found) <= 2 and 0 in found:
        return (packed > 0).astype(np.uint8)
    if not mapped and indices is not None:
        return classes_of(indices, task)
    raise CaseError("mask_values", _shown("colour", unknown))


def _by_colour(task: Task) -> dict[int, str]:
    found = {}
    for key, name in (task.label_map or {}).items():
        if match := _COLOUR.match(key.strip()):
            parts = [int(part) for part in match.groups()[1:] if part is not None]
            if all(part < 256 for part in parts):
                number = (parts[0] << 16) + (parts[1] << 8) + parts[2] if parts else 0
                found[number if parts else int(match[1], 16)] = name
    return found


def _text(value: np.generic) -> str:
    return f"{float(value):.7g}"


def _shown(what: str, texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    plural = "s" if len(texts) > 1 else ""
    return f"the {what}{plural} {', '.join(texts[:_SHOWN])}{more}"
