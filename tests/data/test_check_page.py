"""The pictures of a hospital's check page: every channel, and the mask over each."""

from __future__ import annotations

import numpy as np

from medfl.client.data.check_page import COLOURS, pictures


def has_contours(rgb: np.ndarray) -> bool:  # type: ignore[type-arg]
    return bool((rgb == np.array(COLOURS[0])).all(axis=-1).any())


def test_every_channel_of_a_volume_is_shown_with_the_mask_over_it() -> None:
    # Four channels, each bright at a column of its own; the mask lies in slice 2 only.
    image = np.zeros((4, 8, 8, 5), dtype=np.float32)
    for channel in range(4):
        image[channel, channel, :, 2] = 1 + channel
    mask = np.zeros((8, 8, 5), dtype=np.uint8)
    mask[5:7, 5:7, 2] = 1
    drawn = pictures(image, mask, "LPS")
    assert [name for name, _ in drawn] == ["channel 1", "channel 2", "channel 3", "channel 4"]
    for channel, (_, rgb) in enumerate(drawn):
        assert has_contours(rgb)
        factor = rgb.shape[1] // 8
        brightness = rgb[0, ::factor].sum(axis=-1)
        assert int(brightness.argmax()) == channel
        assert (brightness > 0).sum() == 1


def test_colours_are_shown_as_colours_and_channel_by_channel() -> None:
    image = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    drawn = pictures(image, np.eye(8, dtype=np.uint8), None)
    assert [name for name, _ in drawn] == ["colours", "channel 1", "channel 2", "channel 3"]
    assert all(has_contours(rgb) for _, rgb in drawn)


def test_a_single_channel_has_one_picture_without_a_name() -> None:
    drawn = pictures(np.random.default_rng(0).random((1, 8, 8)).astype(np.float32), None, None)
    assert [name for name, _ in drawn] == [""]
