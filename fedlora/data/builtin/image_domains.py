"""Domains made from one set of images: the same classes, another look (feature shift).

Every transformation is a pure function of one image in whole numbers, so that its bits are the same on
any machine; the noise of an image comes from a stream named by the image itself. An image is given to
exactly one domain: none is in two domains, so none is with two clients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from fedlora.core.seeding import stream
from fedlora.data.images import Images

BLUR = np.array([1, 6, 15, 20, 15, 6, 1])
"""Binomial weights, a Gaussian of standard deviation 1.22 pixels; their sum is 64."""
NOISE = 96
"""Half-width of the uniform noise, in steps of 255."""
FLOOR, FADING = 96, 5
"""Low contrast: black becomes 96, and one step is left of five."""


def rotation(pixels: np.ndarray) -> np.ndarray:
    """A quarter turn anticlockwise."""
    return np.rot90(pixels, axes=(-2, -1))


def inversion(pixels: np.ndarray) -> np.ndarray:
    """The negative, ``255 - x``."""
    return 255 - pixels


def blur(pixels: np.ndarray) -> np.ndarray:
    """Binomial weights of 7 pixels down and across, twice (standard deviation 1.7), edges repeated."""
    summed = pixels.astype(np.int64)
    for axis in (-2, -1, -2, -1):
        summed = ndimage.correlate1d(summed, BLUR, axis=axis, mode="nearest")
    weight = int(BLUR.sum()) ** 4
    return ((summed + weight // 2) // weight).astype(np.uint8)


def contrast(pixels: np.ndarray) -> np.ndarray:
    """Low contrast on grey, ``96 + x // 5``."""
    return FLOOR + pixels // FADING


def thickness(pixels: np.ndarray) -> np.ndarray:
    """Bright strokes grow by a pixel on each side: the maximum over 3 x 3 pixels."""
    grown: np.ndarray = ndimage.grey_dilation(pixels, size=(1,) * (pixels.ndim - 2) + (3, 3))
    return grown


def noise(pixels: np.ndarray) -> np.ndarray:
    """``x + u``, u a whole number uniform in [-96, 96] for each pixel, cut to [0, 255]."""
    drawn = np.stack([_noise_of(image) for image in pixels])
    noisy: np.ndarray = np.clip(pixels.astype(np.int64) + drawn, 0, 255).astype(np.uint8)
    return noisy


DOMAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda pixels: pixels,
    "rotation": rotation,
    "inversion": inversion,
    "blur": blur,
    "contrast": contrast,
    "thickness": thickness,
    "noise": noise,
}
"""Domain -> its transformation of uint8 pixels (images, channels, height, width)."""


def dealt(labels: np.ndarray, count: int, *names: str) -> np.ndarray:
    """A number 0 .. count-1 for each example, int32: equally many of each, and of each within a label.

    The same names give the same numbers; no seed of a run changes them.

    >>> sorted(dealt(np.array([0, 0, 0, 1, 1, 1]), 3, "example").tolist())
    [0, 0, 1, 1, 2, 2]
    """
    order = stream(0, "dealt", *names).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    numbers = np.empty(len(labels), dtype=np.int32)
    numbers[order] = np.arange(len(labels)) % count
    return numbers


def in_domains(images: Images, *names: str) -> Images:
    """The images, each in the one domain that the stream of these names gives it."""
    codes = dealt(images.labels, len(DOMAINS), "domains", *names)
    pixels = np.empty_like(images.pixels)
    for code, transform in enumerate(DOMAINS.values()):
        pixels[codes == code] = transform(images.pixels[codes == code])
    return Images(pixels, images.labels, codes)


def _noise_of(image: np.ndarray) -> np.ndarray:
    name = hashlib.sha256(image.tobytes()).hexdigest()
    return stream(0, "image-noise", name).integers(-NOISE, NOISE + 1, image.shape)
