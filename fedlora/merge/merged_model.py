"""A base model of saved adapters, opened from a local directory, and the same model with an update inside."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from fedlora.assets.loading import check_finite, one_line
from fedlora.core.factors import Product, Tensors
from fedlora.core.files import new_directory
from fedlora.errors import ConfigError, RunFailed
from fedlora.merge.group import AdapterGroup, check_complete, check_saved
from fedlora.models.build import quiet
from fedlora.models.layers import LinearLayer, layer_spec, oriented
from fedlora.tasks import task_named

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types and the classes of transformers that PEFT opens for them."""
TASK_TYPES = {"classifier": "SEQ_CLS", "language-model": "CAUSAL_LM", "image-classifier": None}
"""The task type of each network that fedlora trains; an image model's class stands in auto_mapping."""
TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model", "*.tiktoken", "spiece.model", "sentencepiece*.model", "vocab.*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Base:
    """A base model.

    Attributes:
        path: its directory.
        model: the model in the dtype of its files, or on the meta device if only its shapes were wanted.
        drawn: parameters that its files do not bring: transformers drew them at random.
    """

    path: Path
    model: Any
    drawn: frozenset[str]


def open_base(path: Path, group: AdapterGroup, *, weights: bool) -> Base:
    """The model of a local directory, checked to be one that the adapters fit on.

    Only safetensors are read, and no code of the directory runs.

    Raises:
        ConfigError: no such model, or a layer that it lacks, that has another size, or that an adapter
            says it adapts, or trains whole, and does not.
    """
    with quiet(), one_line(f"--base {path}", "not a transformers model with safetensors"):
        base = _opened(path, group, weights)
    layers = dict(base.model.named_modules())
    what = f"--base {path}: {type(base.model).__name__}"
    for name, spec in group.modules.items():
        layer = layers.get(name)
        if layer is None:
            raise ConfigError(f"{what} has no layer {name}, which the adapters adapt")
        kind = nn.Embedding if name in group.embeddings else LinearLayer
        if not isinstance(layer, kind):
            wanted = "an embedding" if name in group.embeddings else "a linear layer"
            raise ConfigError(f"{what}: {name} is a {type(layer).__name__}, not {wanted}")
        if (own := layer_spec(layer)) != spec:
            raise ConfigError(
                f"{what}: {name} is {own.out_features} x {own.in_features}, the adapters' is "
                f"{spec.out_features} x {spec.in_features}"
            )
    weights_of = dict(base.model.named_parameters(remove_duplicate=False))
    for name, tensor in of_base(group.frozen).items():
        shape = tuple(weights_of[name].shape) if name in weights_of else None
        if shape != tuple(tensor.shape):
            raise ConfigError(
                f"{what}: {name} is {shape or 'missing'}, the adapters bring {tuple(tensor.shape)} "
                "(a vocabulary that grew: name the model that has it)"
            )
    takes = LinearLayer | nn.Embedding
    check_complete(group.members, [n for n, layer in layers.items() if isinstance(layer, takes)])
    check_saved(
        group.members, [n for n, layer in layers.items() if next(layer.parameters(), None) is not None]
    )
    return base


def of_base(frozen: Tensors) -> Tensors:
    """Saved weights of a base under the names that the base has for them."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in frozen.items()}


def write_merged(
    directory: Path, base: Base, products: Mapping[str, Product], head: Tensors, frozen: Tensors
) -> float:
    """Add the products to the base's weights, set its head, and write it with safetensors and tokenizer.

    Sums are float32, the result has the base's dtype.

    Args:
        directory: created; it must not hold anything.
        base: opened with its weights; changed in place.
        products: the update by layer.
        head: tensors that take the place of the base's own.
        frozen: weights to which the products are added, in place of the base's own.

    Returns:
        What rounding to the base's dtype lost, relative to the update: 0 for float32.

    Raises:
        ConfigError: a weight that several layers share, a head of another shape, or parameters that
            neither the base nor the head bring.
        RunFailed: a merged weight that the base's dtype cannot hold.
    """
    tensors = dict(base.model.named_parameters(remove_duplicate=False))
    tensors |= dict(base.model.named_buffers(remove_duplicate=False))
    _check_tied(tensors, [*(f"{layer}.weight" for layer in products), *head])
    _check_head(base, tensors, head | frozen)
    lost = asked = 0.0
    with torch.no_grad():
        for name, tensor in frozen.items():
            tensors[name].copy_(tensor)
        for name, product in products.items():
            layer = base.model.get_submodule(name)
            change = oriented(layer, product.dense())
            wanted = layer.weight.float() + change
            layer.weight.copy_(wanted)
            if not torch.isfinite(layer.weight).all():
                raise RunFailed(f"--merge: {name} overflows {layer.weight.dtype}")
            asked += float(change.double().square().sum())
            lost += float((layer.weight.double() - wanted.double()).square().sum())
        for name, tensor in head.items():
            tensors[name].copy_(tensor)
    with new_directory(directory) as fresh, quiet():
        base.model.save_pretrained(fresh)
        for pattern in TOKENIZER_FILES:
            for file in sorted(base.path.glob(pattern)):
                shutil.copyfile(file, fresh / file.name)
    return math.sqrt(lost / asked) if asked > 0 else 0.0


def _opened(path: Path, group: AdapterGroup, weights: bool) -> Base:
    if not path.is_dir():
        raise ConfigError(f"--base {path}: no such directory")
    local = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(path, **local)
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"--base {path}: its weights are quantised, name the model that it was made from")
    kind = _class_of(path, config, group)
    if not weights:
        with torch.device("meta"):
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        return Base(path, model, frozenset())
    model, report = kind.from_pretrained(
        path,
        config=config,
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **local,
    )
    for name, *_ in report["mismatched_keys"]:
        raise ConfigError(f"--base {path}: {name} has another shape in its files than its config.json says")
    drawn = frozenset(report["missing_keys"])
    check_finite(model, f"--base {path}")
    return Base(path, model.eval(), drawn)


def _class_of(path: Path, config: Any, group: AdapterGroup) -> Any:
    task, mapping = group.identity["task_type"], group.identity["auto_mapping"]
    if group.card is not None:
        if group.card.mean_pooled:
            raise ConfigError(
                "--base and --merge: fedlora's mean-pooled classifier is no model of transformers, "
                "keep the adapter"
            )
        task = TASK_TYPES[task_named(group.card.task).network]
        if group.card.label_names:
            config.num_labels = len(group.card.label_names)
            config.problem_type = task_named(group.card.task).problem_type
            config.id2label = dict(enumerate(group.card.label_names))
            config.label2id = {name: number for number, name in enumerate(group.card.label_names)}
    known = (mapping or {}).get("base_model_class") or (getattr(config, "architectures", None) or [""])[0]
    name = CLASSES[task] if task else str(known)
    found = getattr(transformers, name, None)
    if task is None and not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ConfigError(f"--base {path}: transformers has no model class {name!r}")
    return found


def _check_head(base: Base, own: Mapping[str, Tensor], head: Tensors) -> None:
    for name, tensor in head.items():
        if name not in own or own[name].shape != tensor.shape:
            there = f"is {tuple(own[name].shape)}" if name in own else "is missing"
            raise ConfigError(
                f"--base {base.path}: {name} {there}, the adapters bring {tuple(tensor.shape)} (a head: save "
                "the base with as many labels)"
            )
    for name in sorted(base.drawn - set(head)):
        raise ConfigError(f"--base {base.path}: neither the base nor the adapters bring {name}")


def _check_tied(own: Mapping[str, Tensor], changed: Sequence[str]) -> None:
    for name in changed:
        for other, tensor in own.items():
            if other != name and tensor is own.get(name):
                raise ConfigError(
                    f"--merge: {name} is tied to {other}: changing one would change both "
                    "(leave --merge out, or untie them in the base)"
                )
