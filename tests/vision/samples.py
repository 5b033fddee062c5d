"""Small made-up images that show their labels."""

from __future__ import annotations

import numpy as np

from fedlora.data.images import Images


def shaded(count: int, num_labels: int = 4, seed: int = 0) -> Images:
    """28 x 28 noise, the brighter the larger the label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % num_labels
    dark = rng.integers(0, 40, (count, 1, 28, 28))
    pixels = (dark + 70 * labels[:, None, None, None]).astype(np.uint8)
    return Images(pixels, labels, np.full(count, -1, dtype=np.int32))
