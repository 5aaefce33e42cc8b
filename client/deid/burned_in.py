"""Does a picture seem to hold writing? A warning, never a clearance: it reads nothing.

Writing is drawn: its strokes are thin, much brighter or darker than what lies around them, and its
letters are of one height and stand in a row. Anatomy is seldom all of that at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Pixels a letter may be high; its width, and the gap to the next one, go by its height.
_HEIGHT = (5, 48)
_LETTERS = 5
_STROKE = 9
# Of the picture's range of brightness (1st to 99.9th percentile).
_CONTRAST = 0.35
# More shapes than any page has letters: noise.
_MOST = 20_000
_FRAMES = 8


def text_in_picture(values: NDArray[np.generic]) -> bool:
    """(n, rows, columns) or (n, rows, columns, 3), in any unit; a few frames are looked at.

    Of several frames, what counts is what stays the same in all: labels do not move.
    """
    chosen = np.linspace(0, len(values) - 1, min(len(values), _FRAMES)).astype(int)
    frames = np.asarray(values[np.unique(chosen)], dtype=np.float32)
    if frames.ndim == 4:
        frames = frames.mean(axis=3)
    if min(frames.shape[1:]) < 32:
        return False
    strokes = [_strokes(frame) for frame in frames]
    return any(
        longest_row(np.logical_and.reduce([s[side] for s in strokes])) >= _LETTERS
        for side in (0, 1)
    )


def _strokes(frame: NDArray[np.float32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Pixels of thin bright and of thin dark things (top-hat transforms)."""
    from scipy import ndimage

    frame = np.nan_to_num(frame)
    low, high = np.percentile(frame, (1, 99.9))
    if high <= low:
        # More than 99.8 % of one brightness: what is left may well be writing.
        low, high = float(frame.min()), float(frame.max())
    least = _CONTRAST * float(high - low)
    if least <= 0:
        return np.zeros(frame.shape, bool), np.zeros(frame.shape, bool)
    clipped = np.clip(frame, low, high)
    bright = clipped - ndimage.grey_opening(clipped, size=(_STROKE, _STROKE))
    dark = ndimage.grey_closing(clipped, size=(_STROKE, _STROKE)) - clipped
    return bright > least, dark > least


def longest_row(strokes: NDArray[np.bool_]) -> int:
    """How many letter-like shapes stand in the longest row of such, of equal height and close."""
    from scipy import ndimage

    # Letters of small type touch at corners, and thin ones hold together only by them.
    shapes = (np.ones((3, 3), bool), ndimage.generate_binary_structure(2, 1))
    return max(_longest(_letters(*ndimage.label(strokes, structure=s))) for s in shapes)


def _letters(labels: NDArray[np.int32], count: int) -> list[tuple[int, int, int, int]]:
    """(left, right, top, bottom) of every shape that could be a letter, from left to right."""
    from scipy import ndimage

    if count > _MOST:
        return []
    letters = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if _HEIGHT[0] <= height <= _HEIGHT[1] and width <= 2 * height:
            if 0.12 <= (labels[rows, columns] == number).mean() <= 0.95:
                letters.append((columns.start, columns.stop, rows.start, rows.stop))
    return sorted(letters)


def _longest(letters: list[tuple[int, int, int, int]]) -> int:
    """Longest chain from left to right; letters: (left, right, top, bottom), sorted."""
    best = [1] * len(letters)
    for i, (left, _, top, bottom) in enumerate(letters):
        height = bottom - top
        for j in range(i - 1, -1, -1):
            _, right, above, below = letters[j]
            other = below - above
            tall, small = max(height, other), min(height, other)
            near = -0.2 * tall <= left - right <= 1.2 * tall
            level = abs(bottom - below) <= 0.25 * tall or abs(top - above) <= 0.25 * tall
            if near and level and small >= 0.6 * tall:
                best[i] = max(best[i], best[j] + 1)
    return max(best, default=0)
