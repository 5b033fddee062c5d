"""Image format of a model: size, channels and normalisation that its images must have, and where it lies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
)

from fedlora.assets.fetch import cache_dir
from fedlora.assets.loading import one_line
from fedlora.data.builtin.image_sets import NATIVE, SOURCES, source_identity
from fedlora.data.images import ImageFormat
from fedlora.errors import ConfigError

PATCH = 16
"""Side of a patch, in pixels, of models that do not say."""


RECIPE = 1
"""Version of the pretraining, counted up with every change; the backbones of an old one are not found."""


SIZES: dict[str, dict[str, Any]] = {
    "vit": {
        "patch_size": 4,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    },
    "mixer": {
        "patch_size": 4,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "tokens_mlp_dim": 32,
        "channels_mlp_dim": 128,
    },
}
"""The kinds of backbone that can be pretrained: 49 patches, 4 layers of width 64."""


PRETRAINED = {
    kind if data == "digits" else f"{kind}-{data}": (kind, data) for kind in SIZES for data in SOURCES
}
"""``model.name`` -> the kind of backbone and the image set it was pretrained on."""


TINY: dict[str, dict[str, Any]] = {
    "tiny-vit": {
        "patch_size": 7,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "tiny-mixer": {
        "patch_size": 7,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "tokens_mlp_dim": 8,
        "channels_mlp_dim": 32,
    },
}
"""Random backbones for tests, the same for every seed."""


def image_format(name: str) -> ImageFormat:
    """The images that a model takes: its own size and channels, mean and std of its preprocessor file.

    Without such a file mean and std are 0.5, the convention of most image models.

    Raises:
        ConfigError: no such model, or none with one size of image.
    """
    if name in TINY:
        return replace(NATIVE, tokens=(NATIVE.size // TINY[name]["patch_size"]) ** 2)
    if name in PRETRAINED:
        return NATIVE
    config = image_config(name)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if not isinstance(size, int):
        raise ConfigError(f"model.name = {name!r}: its config.json names no one image_size, but {size!r}")
    own = _preprocessor(name)
    mean, std = (tuple(own.get(key) or (0.5,) * channels) for key in ("image_mean", "image_std"))
    patch = getattr(config, "patch_size", None)
    tokens = (size // (patch if isinstance(patch, int) else PATCH)) ** 2
    return ImageFormat(size=size, channels=channels, mean=mean, std=std, tokens=tokens)


def backbone_home(kind: str, data: str) -> Path:
    """Directory of the backbone of a kind, pretrained on an image set; it need not exist yet."""
    made_of = json.dumps([RECIPE, SIZES[kind], source_identity(data)], sort_keys=True)
    key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    return cache_dir() / "backbones" / f"{kind}-{data}-{key}"


def image_config(name: str) -> Any:
    """Configuration of a model of images; a ConfigError names what is accepted."""
    with one_line(*accepted_models(name)):
        return AutoConfig.from_pretrained(model_source(name), trust_remote_code=False)


def model_source(name: str) -> str:
    """A directory or a hub id."""
    if name not in PRETRAINED:
        return name
    kind, data = PRETRAINED[name]
    home = backbone_home(kind, data)
    if not home.is_dir():
        raise ConfigError(
            f"model.name = {name!r}: not made yet, this command makes it in some minutes: "
            f"fedlora pretrain {kind} --data {data}"
        )
    return str(home)


def accepted_models(name: str) -> tuple[str, str]:
    """Text of a refusal: the key, and what is accepted."""
    known = ", ".join([*PRETRAINED, *TINY])
    return (
        f"model.name = {name!r}",
        f"accepted for images are {known}, a directory with a transformers image classifier and a Hugging "
        "Face id",
    )


def _preprocessor(name: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    path = cached_file(
        name,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    content: dict[str, Any] = json.loads(Path(path).read_text()) if path else {}
    return content
