"""Small made-up images whose labels show: one bright row of patches for each label."""

from __future__ import annotations

import numpy as np

from fedlora.vision.images import Images


def striped(count: int, num_labels: int = 4, seed: int = 0) -> Images:
    """28 x 28 noise with a bright stripe whose height is the label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % num_labels
    pixels = rng.integers(0, 120, (count, 1, 28, 28)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[0, 7 * label : 7 * label + 7] += 130
    return Images(pixels, labels, np.full(count, -1, dtype=np.int32))
