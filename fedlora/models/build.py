"""Building the frozen base: a pretrained encoder with a classification head on top, or a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fedlora.assets.loading import pretrained
from fedlora.assets.models import BUILT_IN_MODELS, model_directory
from fedlora.config import ModelConfig
from fedlora.core.init_drawn import draw_head
from fedlora.core.seeding import drawn_from
from fedlora.data.built_in_tokenizers import BYTE_VOCAB_SIZE, TINY_VOCAB_SIZE
from fedlora.errors import ConfigError
from fedlora.models.fit import pad_in_front
from fedlora.models.layers import head_tensors, keep_head_exact
from fedlora.models.quantized import quantise
from fedlora.models.vision.backbones import image_classifier

NO_LANGUAGE_MODEL = (
    "it is no causal language model; accepted are smollm2, tiny-lm, a directory and a Hugging Face id of one"
)
CAUSAL = 1e-4
"""How far logits may move, by rounding alone, when a later token is another one; relative to the largest."""


class MeanPooledClassifier(nn.Module):
    """A transformer, the mean of its token states over the attention mask, and a linear layer.

    It can be the base of a PEFT model: ``config`` is the transformer's own.
    """

    base_model_prefix = "backbone"

    def __init__(self, backbone: Any, num_labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.config: Any = backbone.config
        self.config.num_labels = num_labels
        self.classifier = nn.Linear(self.config.hidden_size, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **more: Tensor
    ) -> SequenceClassifierOutput:
        """The logits (batch, num_labels), and the mean cross entropy if there are labels.

        ``more`` (``token_type_ids``) goes to the transformer.
        """
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        states = states.to(self.classifier.weight.dtype)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def build_model(config: ModelConfig, num_labels: int, seed: int, network: str = "classifier") -> nn.Module:
    """The frozen base in evaluation mode, on the CPU: float32, ``model.dtype``, or linear layers of 4 bits.

    ``network`` is what a task wants, see `NETWORKS`; a language model has no head that is trained.

    The head, and anything else that the checkpoint lacks, is drawn from streams of ``seed``; the
    global random state stays as it was. A head that the checkpoint brings is kept.

    Raises:
        ConfigError: the model cannot be found, has no place for a mean or for a head, or cannot be quantised.
        AssetError: a built-in model could not be fetched.
    """
    with quiet(), drawn_from(seed, "missing-weights"):
        model = NETWORKS[network](config, num_labels, seed)
        if config.quantization == "4bit":
            quantise(model, config.name)
    keep_head_exact(model)
    return model.requires_grad_(False).eval()


def pick_device(name: str) -> torch.device:
    """The device of ``engine.device``; ``auto`` takes cuda, then mps, then cpu.

    Raises:
        ConfigError: the device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name, False):
        there = ", ".join(device for device, here in available.items() if here)
        raise ConfigError(f"engine.device = {name!r}: not available here, accepted are auto, {there}")
    return torch.device(name)


def _classifier(config: ModelConfig, num_labels: int, seed: int) -> nn.Module:
    if config.pooling == "mean":
        return _mean_pooled(config, num_labels, seed)
    return _with_own_head(config, num_labels)


def _language_model(config: ModelConfig, num_labels: int, seed: int) -> nn.Module:
    if config.name == "tiny":
        raise ConfigError(f"model.name = 'tiny': {NO_LANGUAGE_MODEL}")
    model = _tiny_lm() if config.name == "tiny-lm" else _pretrained(AutoModelForCausalLM, config)
    model.config.use_cache = False  # keys and values that training never reads
    _check_causal(config.name, model)
    network: nn.Module = model
    return network


def _image_classifier(config: ModelConfig, num_labels: int, seed: int) -> nn.Module:
    return image_classifier(config.name, num_labels, seed)


NETWORKS: dict[str, Callable[[ModelConfig, int, int], nn.Module]] = {
    "classifier": _classifier,
    "language-model": _language_model,
    "image-classifier": _image_classifier,
}
"""What can be built, of the configuration, the number of labels and the seed."""


def _check_causal(name: str, model: Any) -> None:
    """Refuse a model in which a token sees those after it: it would be shown what it has to predict."""
    ids = torch.tensor([[3, 4, 5], [3, 4, 6]])
    with torch.no_grad():
        one, other = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :2]
    if not torch.allclose(one, other, rtol=0, atol=CAUSAL * float(one.abs().max())):
        raise ConfigError(f"model.name = {name!r}: its tokens see those that follow, {NO_LANGUAGE_MODEL}")


def _mean_pooled(config: ModelConfig, num_labels: int, seed: int) -> nn.Module:
    name = config.name
    backbone = _tiny_backbone() if name == "tiny" else _pretrained(AutoModel, config)
    if backbone.config.is_encoder_decoder or not hasattr(backbone.config, "hidden_size"):
        raise ConfigError(
            f"model.name = {name!r}: {backbone.config.model_type} has no single sequence of token states, "
            'use model.pooling = "model"'
        )
    model = MeanPooledClassifier(backbone, num_labels)
    draw_head(model.classifier, seed)
    return model


def _with_own_head(config: ModelConfig, num_labels: int) -> nn.Module:
    name = config.name
    if name == "tiny":
        model = AutoModelForSequenceClassification.from_config(_tiny_config(num_labels))
        model.bert.load_state_dict(_tiny_backbone().state_dict(), strict=False)
    else:
        model = _pretrained(AutoModelForSequenceClassification, config, num_labels)
    if getattr(model.config, "summary_type", "") == "last" and hasattr(model, "sequence_summary"):
        pad_in_front(model.base_model)
    if model.config.pad_token_id is None:  # decoders need one to find the last token of a padded batch
        model.config.pad_token_id = model.config.eos_token_id
    head: nn.Module = model
    if not head_tensors(head):
        raise ConfigError(f"model.name = {name!r}: {type(model).__name__} has no classification head")
    return head


def _pretrained(kind: Any, config: ModelConfig, labels: int = 0) -> Any:
    """The pretrained weights from a built-in asset, a directory or the hub."""
    name = config.name
    accepted = (
        f"accepted are {', '.join(BUILT_IN_MODELS)}, a directory with a transformers model that fits the "
        "task and a Hugging Face id"
    )
    return pretrained(
        kind, model_directory(name) or name, f"model.name = {name!r}", accepted, labels=labels,
        dtype=config.dtype,
    )  # fmt: skip


def _tiny_config(num_labels: int = 2) -> BertConfig:
    return BertConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        num_labels=num_labels,
    )


def _tiny_backbone() -> Any:
    """The same random weights for every seed of a run."""
    with drawn_from(0, "tiny"):
        return BertModel(_tiny_config())


def _tiny_lm() -> Any:
    """Like SmolLM2, but small and random; the same weights for every seed of a run."""
    config = LlamaConfig(
        vocab_size=BYTE_VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with drawn_from(0, "tiny-lm"):
        return LlamaForCausalLM(config)


@contextmanager
def quiet() -> Iterator[None]:
    """No loading report and no loading bar: a new head is what we ask for."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
