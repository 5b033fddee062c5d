"""Which layers take adapters, which tensors are the head, on the architectures people use."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from fedlora.config import ModelConfig
from fedlora.errors import ConfigError
from fedlora.models import build_model, head_tensors, linear_layers, resolve_targets

ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**ENCODER),
    "roberta": RobertaConfig(**ENCODER),
    "deberta-v2": DebertaV2Config(**ENCODER, pooler_hidden_size=16),
    "albert": AlbertConfig(**ENCODER, embedding_size=8),
    "modernbert": ModernBertConfig(
        **ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "deberta": DebertaConfig(**ENCODER, pooler_hidden_size=16, relative_attention=False),
    "distilbert": DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2),
    "llama": LlamaConfig(**ENCODER, num_key_value_heads=1),
}


def classifier(name: str) -> nn.Module:
    with torch.random.fork_rng():
        return AutoModelForSequenceClassification.from_config(CONFIGS[name])


@pytest.mark.parametrize(
    ("name", "head", "targets"),
    [
        ("bert", ("classifier",), {"query", "value"}),
        ("roberta", ("classifier",), {"query", "value"}),
        ("deberta-v2", ("pooler", "classifier"), {"query_proj", "value_proj"}),
        ("distilbert", ("pre_classifier", "classifier"), {"q_lin", "v_lin"}),
        ("albert", ("classifier",), {"query", "value"}),
        ("modernbert", ("head", "classifier"), {"Wqkv"}),
        ("deberta", ("pooler", "classifier"), {"in_proj"}),
        ("gpt2", ("score",), {"c_attn"}),
        ("llama", ("score",), {"q_proj", "v_proj"}),
    ],
)
def test_head_and_default_targets(name: str, head: tuple[str, ...], targets: set[str]) -> None:
    model = classifier(name)
    assert tuple(dict.fromkeys(name.partition(".")[0] for name in head_tensors(model))) == head
    assert {target.rpartition(".")[2] for target in resolve_targets(model, "")} == targets


def test_an_architecture_without_a_default_needs_names() -> None:
    model = classifier("distilbert")
    for layer in model.distilbert.transformer.layer:
        layer.attention.q_lin = nn.Identity()
    with pytest.raises(
        ConfigError, match="there is no default for distilbert, name some of its layers: k_lin"
    ):
        resolve_targets(model, "")
    assert len(resolve_targets(model, "k_lin,v_lin")) == 2


def test_the_head_is_never_a_target() -> None:
    model = classifier("roberta")
    assert any(name.endswith("dense.weight") for name in head_tensors(model))
    assert all(name.startswith("roberta.") for name in resolve_targets(model, "dense"))


def test_targets_are_endings_in_the_order_of_the_model() -> None:
    model = build_model(ModelConfig(name="tiny"), 2, 0)
    chosen = resolve_targets(model, "attention.output.dense, query")
    assert [name.removeprefix("backbone.encoder.layer.") for name in chosen] == [
        f"{layer}.attention.{name}" for layer in (0, 1) for name in ("self.query", "output.dense")
    ]
    assert resolve_targets(model, chosen[0]) == chosen[:1]


@pytest.mark.parametrize("unknown", ["q_proj", "uery", "word_embeddings"])
def test_a_target_that_matches_no_linear_layer_is_refused(unknown: str) -> None:
    model = build_model(ModelConfig(name="tiny"), 2, 0)
    with pytest.raises(
        ConfigError, match=rf"'query,{unknown}': no linear layer is called '{unknown}', bert has query, "
    ):
        resolve_targets(model, f"query,{unknown}")


def test_sizes_are_in_linear_orientation() -> None:
    for name, attention in (("gpt2", "c_attn"), ("bert", "query")):
        model = classifier(name)
        layer, spec = next((n, s) for n, s in linear_layers(model).items() if n.endswith(attention))
        x = torch.zeros(1, spec.in_features)
        assert model.get_submodule(layer)(x).shape == (1, spec.out_features)
    assert (spec.out_features, spec.in_features) == (16, 16)
