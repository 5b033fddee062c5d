"""Images as plain arrays, and the form in which a model wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedlora.errors import ConfigError

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of channels."""
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a file that is broken, no image, or absurdly large."""


@dataclass(frozen=True, slots=True)
class Images:
    """Images of one size with their labels.

    Attributes:
        pixels: uint8, shape (images, channels, height, width).
        labels: int64, shape (images,).
        domains: index into the domain names, -1 where there are none, int32, shape (images,).
    """

    pixels: np.ndarray
    labels: np.ndarray
    domains: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: np.ndarray) -> Images:
        """Those of the indices or of the true ones."""
        return Images(self.pixels[which], self.labels[which], self.domains[which])


@dataclass(frozen=True, slots=True)
class ImageData:
    """Train and test images of a task; the split is the same for every seed.

    Attributes:
        train: what the clients hold between them.
        test: what is only ever evaluated.
        label_names: name of each label.
        domain_names: name of each domain, empty where there are none.
        natural: for each training image the value of ``data.partition-by``, where that is neither label nor
            domain; else empty.
        names: as in `fedlora.data.sources.RawData`.
    """

    train: Images
    test: Images
    label_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    natural: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFormat:
    """Image format of a model: square images of one size, ``(pixel / 255 - mean) / std`` by channel.

    Attributes:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (red, green, blue).
        mean: one number for each channel.
        std: one number for each channel, > 0.
        tokens: patches that the model makes of an image; what a pass over one costs.

    Raises:
        ConfigError: another number of channels.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens: int = 49

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.channels not in MODES or len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError(
                f"model: takes images of {self.channels} channels, mean {self.mean}, std {self.std}; "
                "accepted are 1 or 3 channels with a mean and a std for each"
            )

    def pixel_values(self, pixels: np.ndarray) -> Tensor:
        """The model's input, float32 (images, channels, size, size), from uint8 of the same shape."""
        shape = (1, self.channels, 1, 1)
        mean, std = torch.tensor(self.mean).view(shape), torch.tensor(self.std).view(shape)
        return (torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255 - mean) / std


def image_batch(images: Images, indices: Sequence[int] | np.ndarray, form: ImageFormat) -> dict[str, Tensor]:
    """One batch: pixel_values float32 (batch, channels, size, size), labels int64 (batch,)."""
    which = np.asarray(indices, dtype=np.int64)
    return {
        "pixel_values": form.pixel_values(images.pixels[which]),
        "labels": torch.from_numpy(images.labels[which]),
    }


def fitted(image: Image.Image, form: ImageFormat) -> np.ndarray:
    """A picture of any size and mode in the form of a model, uint8 (channels, size, size).

    Turned upright by its EXIF tag; transparent parts become white; 16-bit grey keeps its upper 8 bits;
    then grey or RGB (Pillow's conversion) and bilinear resizing of the whole picture, not of a cut-out:
    the aspect ratio is not kept. Of an animation the first frame.

    Raises:
        ValueError: a mode without a fixed range (32-bit integers, floats).
        OSError: a file that breaks off while it is decoded.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32 bits a pixel) has no fixed range, save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[form.channels])
    if image.size != (form.size, form.size):
        image = image.resize((form.size, form.size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if form.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def refitted(images: Images, form: ImageFormat) -> Images:
    """Images that are arrays already, in the form of a model; themselves where they are in it."""
    _, channels, height, width = images.pixels.shape
    if (channels, height, width) == (form.channels, form.size, form.size):
        return images
    pictures = (Image.fromarray(p[0] if channels == 1 else p.transpose(1, 2, 0)) for p in images.pixels)
    return Images(np.stack([fitted(p, form) for p in pictures]), images.labels, images.domains)
