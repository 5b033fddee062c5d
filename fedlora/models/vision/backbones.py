"""Image models for a federation: pretrained here, random ones for tests, and users' own.

``vit`` and ``mixer`` (pretrained on digits), ``vit-fashion-mnist`` and ``mixer-fashion-mnist`` are made on
this machine by ``fedlora pretrain``; they are small and not off-the-shelf models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedlora.assets.loading import pretrained
from fedlora.core.init_drawn import draw_head
from fedlora.core.seeding import drawn_from
from fedlora.data.builtin.image_sets import NATIVE
from fedlora.data.image_reader import (
    PRETRAINED,
    TINY,
    accepted_models,
    model_source,
)
from fedlora.models.vision.mixer import MlpMixerConfig, MlpMixerForImageClassification


def image_classifier(name: str, num_labels: int, seed: int) -> nn.Module:
    """A frozen float32 image classifier in evaluation mode; ``model(pixel_values=...)`` has ``.logits``.

    The head of a pretrained or tiny backbone, and what any other checkpoint lacks (a head for another
    number of labels too), is drawn from streams of ``seed``. The global random state stays as it was.

    Raises:
        ConfigError: no such model, none for images, or a backbone that was not pretrained yet.
    """
    with drawn_from(seed, "missing-weights"):
        model = _tiny(name, num_labels) if name in TINY else _loaded(name, num_labels)
    if name in TINY or name in PRETRAINED:
        draw_head(model.classifier, seed)
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen


def fresh_classifier(kind: str, sizes: Mapping[str, Any], num_labels: int) -> Any:
    """A ViT or MLP-Mixer with a head for 28 x 28 grey images, weights from the global random state."""
    shape = {"image_size": NATIVE.size, "num_channels": NATIVE.channels, "num_labels": num_labels}
    if kind == "mixer":
        return MlpMixerForImageClassification(MlpMixerConfig(**shape, **sizes))
    return ViTForImageClassification(ViTConfig(**shape, **sizes))


def _tiny(name: str, num_labels: int) -> Any:
    with drawn_from(0, name):
        return fresh_classifier(name.removeprefix("tiny-"), TINY[name], num_labels)


def _loaded(name: str, num_labels: int) -> Any:
    return pretrained(
        AutoModelForImageClassification,
        model_source(name),
        *accepted_models(name),
        labels=num_labels,
        new_head=True,
    )
