"""``fedlora pretrain``: a small backbone from random weights, on images that no client and no test ever sees.

Supervised: AdamW, cosine schedule after a warm-up, random shifts, plain images only. Each batch is cut
into shards of fixed size, each is differentiated on one thread, and their gradients are added in order: any
number of cores gives the same bits (on the same kind of processor).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from fedlora.assets.fetch import create_directory
from fedlora.core.parallel import parallel_map
from fedlora.core.seeding import derive, drawn_from, stream
from fedlora.data.builtin.image_domains import dealt
from fedlora.data.builtin.image_sets import NATIVE, SOURCES, image_parts
from fedlora.data.image_reader import SIZES, backbone_home
from fedlora.data.images import Images, image_batch
from fedlora.errors import RunFailed, unknown_name
from fedlora.models.vision.backbones import fresh_classifier

FACTS, CARD = "pretraining.json", "README.md"
EVALUATION_BATCH = 200
CHANCE = 2
"""A backbone must be this many times better than guessing, or the training has failed."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Training recipe of a backbone; with a change `fedlora.data.image_reader.RECIPE` counts up."""

    steps: int
    batch_size: int = 64
    shards: int = 2
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    shift: int = 2
    """Pixels by which an image is moved at most, in each direction; black comes in."""


RECIPES = {"vit": Recipe(steps=2000), "mixer": Recipe(steps=1000)}
"""Sized to take one to two minutes on two idle cores."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """Facts about a backbone, as written beside it.

    Attributes:
        kind: vit or mixer.
        data: the image set whose part for pretraining it saw.
        images: how many images it was trained on.
        held_out: how many of that part were kept back to measure it.
        accuracy: on those.
        parameters: numbers in the backbone, without the head.
        recipe: how it was trained.
    """

    kind: str
    data: str
    images: int
    held_out: int
    accuracy: float
    parameters: int
    recipe: Recipe


Track = Callable[[range], Iterable[int]]
"""Wraps the steps, to show how far they are."""


def pretrain(kind: str, data: str, track: Track = iter) -> tuple[Path, Pretrained]:
    """The directory of a backbone, and its facts; trained on first use, else found.

    Raises:
        ConfigError: an unknown kind or image set.
        AssetError: the images could not be fetched.
        RunFailed: the training went astray.
    """
    if kind not in SIZES:
        raise unknown_name("KIND", kind, SIZES)
    if data not in SOURCES:
        raise unknown_name("--data", data, SOURCES)
    home = backbone_home(kind, data)

    def fill(draft: Path) -> None:
        model, facts = trained(kind, data, image_parts(data).pretrain, RECIPES[kind], track)
        _write(draft, model, facts)

    create_directory(home, fill)
    return home, read_facts(home)


def read_facts(home: Path) -> Pretrained:
    """Record of the backbone in a directory."""
    content = json.loads((home / FACTS).read_text())
    return Pretrained(**{**content, "recipe": Recipe(**content["recipe"])})


def trained(kind: str, data: str, images: Images, recipe: Recipe, track: Track) -> tuple[Any, Pretrained]:
    """A classifier trained on nine tenths of the images and measured on the last tenth."""
    held_back = dealt(images.labels, 10, "pretraining", data) == 0
    own, held_out = images.take(~held_back), images.take(held_back)
    num_labels = int(images.labels.max()) + 1
    with drawn_from(0, "pretraining", kind, data):
        model = fresh_classifier(kind, SIZES[kind], num_labels)
    _train(model.train(), own, recipe, derive(0, "pretraining", kind, data), track)
    accuracy = float((predictions(model.eval(), held_out) == held_out.labels).mean())
    if accuracy < CHANCE / num_labels:
        raise RunFailed(f"pretraining of {kind} on {data}: accuracy {accuracy:.3f} on held-out images")
    head = sum(p.numel() for p in model.classifier.parameters())
    facts = Pretrained(
        kind=kind,
        data=data,
        images=len(own),
        held_out=len(held_out),
        accuracy=accuracy,
        parameters=sum(p.numel() for p in model.parameters()) - head,
        recipe=recipe,
    )
    return model, facts


def predictions(model: nn.Module, images: Images) -> np.ndarray:
    """The label that the model gives each image, int64 (images,)."""

    def of(start: int) -> np.ndarray:
        batch = image_batch(images, range(start, min(start + EVALUATION_BATCH, len(images))), NATIVE)
        with torch.inference_mode():
            chosen: np.ndarray = model(pixel_values=batch["pixel_values"]).logits.argmax(dim=1).numpy()
        return chosen

    return np.concatenate(parallel_map(of, range(0, len(images), EVALUATION_BATCH)))


def shifted(pixels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each image moved by its own (down, right) pixels, shape (images, 2); black comes in.

    >>> shifted(np.array([[[[1, 2], [3, 4]]]]), np.array([[0, 1]])).tolist()
    [[[[0, 1], [0, 3]]]]
    """
    most = int(np.abs(offsets).max(initial=0))
    padded = np.pad(pixels, ((0, 0), (0, 0), (most, most), (most, most)))
    height, width = pixels.shape[-2:]
    return np.stack(
        [
            image[:, most - down : most - down + height, most - right : most - right + width]
            for image, (down, right) in zip(padded, offsets, strict=True)
        ]
    )


def _train(model: Any, images: Images, recipe: Recipe, seed: int, track: Track) -> None:
    replicas = [model, *(_sharing(model) for _ in range(recipe.shards - 1))]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    draw, order = stream(seed, "batches"), np.empty(0, dtype=np.int64)
    for _ in track(range(recipe.steps)):
        if len(order) < recipe.batch_size:
            order = np.concatenate([order, draw.permutation(len(images))])
        chosen, order = images.take(order[: recipe.batch_size]), order[recipe.batch_size :]
        offsets = draw.integers(-recipe.shift, recipe.shift + 1, (recipe.batch_size, 2))
        batch = Images(shifted(chosen.pixels, offsets), chosen.labels, chosen.domains)
        rows = np.array_split(np.arange(recipe.batch_size), recipe.shards)
        gradients = parallel_map(
            lambda pair: _gradient(pair[0], batch.take(pair[1]), recipe.batch_size),  # noqa: B023
            list(zip(replicas, rows, strict=True)),
        )
        for parameter, *parts in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = sum(parts[1:], start=parts[0])
        optimizer.step()
        schedule.step()


def _gradient(replica: nn.Module, images: Images, batch_size: int) -> list[Any]:
    """The shard's part of the gradient of the batch's mean loss, a tensor (or None) for each parameter."""
    batch = image_batch(images, np.arange(len(images)), NATIVE)
    loss = cross_entropy(replica(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="sum")
    return list(torch.autograd.grad(loss / batch_size, list(replica.parameters())))


def _sharing(model: nn.Module) -> nn.Module:
    """A second module over the same memory, so that two threads never meet in one autograd graph."""
    replica = copy.deepcopy(model)
    for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    return replica


def _rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine to zero; a share of the learning rate."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)))


def _write(draft: Path, model: Any, facts: Pretrained) -> None:
    """The backbone without its head in transformers' form; every run draws a head of its own."""
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{model.base_model_prefix}.")
    }
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(draft)
    (draft / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")
    (draft / CARD).write_text(model_card(facts))


def model_card(facts: Pretrained) -> str:
    """Provenance of the backbone, for a report."""
    recipe = "\n".join(
        f"| {key.replace('_', ' ')} | {value} |" for key, value in asdict(facts.recipe).items()
    )
    return f"""# {facts.kind}, pretrained on {facts.data} by fedlora

**Not an off-the-shelf model.** {facts.parameters:,} parameters that
`fedlora pretrain {facts.kind} --data {facts.data}` trained from random weights on this machine.
Say so wherever you report a result that rests on it, and do not compare it with results on large models.

- Data: {facts.images:,} images of {facts.data}, a fixed part that no client trains on and no test contains.
  Plain images: no rotation, inversion or other domain of the federation was seen.
- Accuracy on {facts.held_out:,} more images of that part, also in no federation: {facts.accuracy:.4f}.
- The head is not kept: every run draws its own.
- Input: grey, 28 x 28 pixels, (x / 255 - 0.5) / 0.5.

| training | |
|---|---|
{recipe}
"""
