"""Tiny random language models of the architectures that people fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from fedlora.config import ModelConfig
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.tasks import task_named

VOCABULARY = 200
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "gemma": lambda: GemmaConfig(**SMALL, head_dim=8),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}


def save_tiny_lm(directory: Path, architecture: str) -> Path:
    """A random model of an architecture, without a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]()).save_pretrained(directory)
    return directory


def adapted_lm(name: str = "tiny-lm", targets: str = "", task: str = "causal-lm") -> AdaptedModel:
    found = task_named(task)
    module = build_model(ModelConfig(name=name), 0, 0, found.network)
    return AdaptedModel(module, resolve_targets(module, targets), found)
