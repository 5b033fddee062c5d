"""Pictures of any mode and size become the one form that a model takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fedlora.data.images import ImageFormat, Images, fitted, image_batch, refitted
from fedlora.errors import ConfigError

GREY = ImageFormat(size=4, channels=1, mean=(0.5,), std=(0.25,))
COLOUR = ImageFormat(size=4, channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
RED = Image.new("RGB", (4, 4), (200, 0, 0))


@pytest.mark.parametrize("form", [GREY, COLOUR])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "YCbCr", "HSV"])
def test_any_mode_and_size_fits(form: ImageFormat, mode: str) -> None:
    pixels = fitted(Image.new(mode, (9, 5)), form)
    assert pixels.shape == (form.channels, 4, 4)
    assert pixels.dtype == np.uint8


def test_colours_keep_their_channels() -> None:
    assert fitted(RED, COLOUR)[:, 2, 3].tolist() == [200, 0, 0]
    assert fitted(RED, GREY)[0, 2, 3] == round(200 * 0.299)


def test_transparent_parts_are_white() -> None:
    assert (fitted(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), COLOUR) == 255).all()
    assert (fitted(Image.new("RGBA", (4, 4), (0, 0, 0, 255)), COLOUR) == 0).all()


def test_sixteen_bits_are_scaled_not_cut() -> None:
    picture = Image.fromarray(np.full((4, 4), 256 * 77 + 200, dtype=np.uint16))
    assert picture.mode == "I;16"
    assert (fitted(picture, GREY) == 77).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_without_a_range_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        fitted(Image.new(mode, (4, 4)), GREY)


def test_the_exif_tag_turns_the_picture() -> None:
    picture = Image.fromarray(np.array([[0, 255], [0, 255]], dtype=np.uint8))
    picture.getexif()[0x0112] = 3  # by 180 degrees
    upright = fitted(picture, ImageFormat(size=2, channels=1, mean=(0.5,), std=(0.5,)))
    assert upright[0].tolist() == [[255, 0], [255, 0]]


def test_resizing_is_bilinear_over_the_whole_picture() -> None:
    halves = np.zeros((8, 8), dtype=np.uint8)
    halves[:, 4:] = 200
    expected = Image.fromarray(halves).resize((4, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(fitted(Image.fromarray(halves), GREY)[0], np.asarray(expected))
    assert 0 < fitted(Image.fromarray(halves), GREY)[0, 0, 1] < 200


def test_pixel_values_are_standardised_by_channel() -> None:
    pixels = np.stack([np.full((4, 4), value, dtype=np.uint8) for value in (0, 51, 255)])[None]
    values = COLOUR.pixel_values(pixels)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[0, :, 0, 0], torch.tensor([-0.1, 0.0, 2.8]))


def test_a_batch_is_the_images_asked_for() -> None:
    pixels = np.arange(5, dtype=np.uint8).repeat(16).reshape(5, 1, 4, 4)
    images = Images(pixels, np.arange(5), np.zeros(5, dtype=np.int32))
    batch = image_batch(images, [3, 1], GREY)
    assert batch["labels"].tolist() == [3, 1]
    torch.testing.assert_close(batch["pixel_values"], GREY.pixel_values(pixels[[3, 1]]))


def test_refitting_changes_size_and_channels_and_leaves_what_fits() -> None:
    pixels = np.arange(98, dtype=np.uint8).reshape(2, 1, 7, 7)
    images = Images(pixels, np.arange(2), np.zeros(2, dtype=np.int32))
    coloured = refitted(images, COLOUR).pixels
    assert coloured.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(coloured[:, 0], coloured[:, 2])
    same = ImageFormat(size=7, channels=1, mean=(0.5,), std=(0.5,))
    assert refitted(images, same) is images


@pytest.mark.parametrize(
    ("channels", "mean"), [(2, (0.5, 0.5)), (4, (0.5,) * 4), (3, (0.5,)), (1, (0.5,) * 3)]
)
def test_other_channels_are_refused(channels: int, mean: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        ImageFormat(size=4, channels=channels, mean=mean, std=mean)
