"""Each image in one domain, each transformation the bits it is documented to be."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fedlora.data.builtin.image_domains import DOMAINS, NOISE, dealt, in_domains
from fedlora.data.images import Images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (70, 1, 9, 9)).astype(np.uint8)
LABELS = np.arange(70) % 5
NO_DOMAINS = np.full(70, -1, dtype=np.int32)


def ramp() -> np.ndarray:
    return np.arange(100, dtype=np.uint8).reshape(1, 1, 10, 10)


@pytest.mark.parametrize("name", DOMAINS)
def test_a_transformation_keeps_form_and_input_and_knows_one_image_at_a_time(name: str) -> None:
    before = PIXELS.copy()
    changed = DOMAINS[name](PIXELS)
    assert changed.shape == PIXELS.shape
    assert changed.dtype == np.uint8
    np.testing.assert_array_equal(PIXELS, before)
    alone = np.concatenate([DOMAINS[name](PIXELS[i : i + 1]) for i in (3, 41)])
    np.testing.assert_array_equal(changed[[3, 41]], alone)
    assert (name == "plain") == np.array_equal(changed, PIXELS)


def test_rotation_turns_anticlockwise() -> None:
    assert DOMAINS["rotation"](ramp())[0, 0, -1, 0] == 0
    np.testing.assert_array_equal(DOMAINS["rotation"](ramp())[0, 0, 0], np.arange(9, 100, 10))


def test_inversion_is_its_own_inverse() -> None:
    np.testing.assert_array_equal(DOMAINS["inversion"](DOMAINS["inversion"](PIXELS)), PIXELS)


def test_blur_keeps_flat_images_and_is_a_gaussian_of_that_width() -> None:
    flat = np.full((1, 1, 9, 9), 201, dtype=np.uint8)
    np.testing.assert_array_equal(DOMAINS["blur"](flat), flat)
    point = np.zeros((1, 1, 41, 41), dtype=np.uint8)
    point[0, 0, 20, :] = 255  # a line: what is left across it is the kernel
    profile = DOMAINS["blur"](point)[0, 0, :, 20].astype(float)
    place = np.arange(41) - 20
    width = np.sqrt((profile * place**2).sum() / profile.sum())
    assert width == pytest.approx(np.sqrt(3), rel=0.03)  # tails below half a step are lost


def test_contrast_leaves_a_fifth_of_the_range() -> None:
    extremes = np.array([0, 4, 5, 255], dtype=np.uint8).reshape(1, 1, 2, 2)
    assert DOMAINS["contrast"](extremes).ravel().tolist() == [96, 96, 97, 147]


def test_thickness_is_the_largest_neighbour() -> None:
    dot = np.zeros((1, 2, 7, 7), dtype=np.uint8)
    dot[0, 1, 3, 3] = 9
    grown = DOMAINS["thickness"](dot)
    assert grown[0, 0].sum() == 0
    assert (grown[0, 1, 2:5, 2:5] == 9).all()
    assert grown.sum() == 81


def test_noise_is_bounded_and_new_for_each_image() -> None:
    grey = np.full((2, 1, 28, 28), 128, dtype=np.uint8)
    grey[1, 0, 0, 0] = 129
    noisy = DOMAINS["noise"](grey).astype(int)
    assert np.abs(noisy - grey).max() <= NOISE
    assert np.abs(noisy - grey).max() > 0.9 * NOISE
    assert (noisy[0] != noisy[1]).mean() > 0.9


def test_the_bits_never_change() -> None:
    """Published results rest on them."""
    images = in_domains(Images(PIXELS, LABELS, NO_DOMAINS), "example")
    digest = hashlib.sha256(images.pixels.tobytes() + images.domains.astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "ca7115f0e072b884"


def test_domains_are_balanced_within_each_label() -> None:
    codes = dealt(LABELS, 7, "balance")
    table = np.histogram2d(LABELS, codes, bins=(5, 7))[0]
    assert (table == 2).all()
    assert dealt(LABELS, 7, "balance").tolist() == codes.tolist() != dealt(LABELS, 7, "other").tolist()


def test_every_image_is_shown_in_the_one_domain_of_its_code() -> None:
    images = in_domains(Images(PIXELS, LABELS, NO_DOMAINS), "example")
    for code, transform in enumerate(DOMAINS.values()):
        members = images.domains == code
        assert members.sum() == 10
        np.testing.assert_array_equal(images.pixels[members], transform(PIXELS[members]))
    np.testing.assert_array_equal(images.labels, LABELS)
