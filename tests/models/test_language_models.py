"""Language models of several architectures: trained, exported, and loaded again by PEFT alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import BertConfig, BertLMHeadModel

from clients.training.train import train_local
from fedlora.config import ModelConfig, TrainConfig
from fedlora.core.state import State
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from fedlora.models import AdapterCard, check_length
from fedlora.models.build import build_model
from fedlora.models.export import load_adapter, save_adapter
from tests.clients.cohort.samples import assert_same, member, privately, task
from tests.clients.samples import BOTH, examples, train_by_dp_sgd
from tests.models.language import ARCHITECTURES, VOCABULARY, adapted_lm, save_tiny_lm
from tests.models.samples import logits, random_adapters, token_batch

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def small(number: int = 24, seed: int = 0) -> Examples:
    data = examples(number, seed)
    return replace(data, tokens=data.tokens % (VOCABULARY - 3) + 3)


@every_architecture
def test_trained_exported_and_loaded_by_peft_alone(architecture: str, tmp_path: Path) -> None:
    base = save_tiny_lm(tmp_path / "base", architecture)
    model = adapted_lm(str(base))
    assert model.initial_head == {}
    assert not any("lm_head" in name or "embed" in name for name in model.modules)
    model.load(random_adapters(model.modules, 4), {}, trained=BOTH)
    frozen = {n: p.clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    begun = model.read()[0]
    data = small()
    result = train_local(
        model, data, np.arange(24), 0, TrainConfig(batch_size=4, learning_rate=0.01), local_steps=2, seed=1
    )
    assert result.loss is not None
    assert result.loss > 1
    assert all(not torch.equal(f.A, begun[name].A) for name, f in result.adapters.items())
    now = dict(model.module.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())

    batch = token_batch(VOCABULARY)
    model.load(result.adapters, {})
    wanted = logits(model.module, batch)
    card = AdapterCard(
        model=ModelConfig(name=str(base)), label_names=(), max_length=32, seed=0, task="causal-lm"
    )
    state = State(round=1, adapters=result.adapters, head={}, seed=0)
    save_adapter(tmp_path / "adapter", state, {}, card, model=model)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ours, read = load_adapter(tmp_path / "adapter")
    assert read == card
    mask = batch["attention_mask"].bool()
    for loaded in (plain, ours):
        torch.testing.assert_close(logits(loaded, batch)[mask], wanted[mask], rtol=1e-5, atol=1e-5)


@every_architecture
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_cohort_trains_as_one_by_one(architecture: str, private: bool, tmp_path: Path) -> None:
    model = adapted_lm(str(save_tiny_lm(tmp_path, architecture)))
    model.module.to(torch.float64)
    members = [member(model, 0, steps=2), member(model, 1, rank=2, size=7, steps=3)]
    assert_same(model, privately(members) if private else members, task(small(60, 3), dropout=0.2))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@every_architecture
def test_private_training_passes_its_self_test(architecture: str, mode: str, tmp_path: Path) -> None:
    model = adapted_lm(str(save_tiny_lm(tmp_path, architecture)))
    model.load(random_adapters(model.modules, 2), {}, trained=BOTH)
    train_by_dp_sgd(
        model, small(), np.arange(24), 0, TrainConfig(batch_size=4), local_steps=1, noise_multiplier=1.0,
        max_grad_norm=1.0, seed=0, grad_sample_mode=mode,
    )  # fmt: skip


def test_a_model_whose_tokens_see_the_future_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.3,
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no causal language model"):
        build_model(ModelConfig(name=str(tmp_path)), 0, 0, "language-model")


@every_architecture
def test_sequences_beyond_the_positions_are_refused(architecture: str, tmp_path: Path) -> None:
    network = adapted_lm(str(save_tiny_lm(tmp_path, architecture))).module
    check_length("x", network, 64)
    with pytest.raises(ConfigError, match=r"data\.max-length = 65: 'x' takes at most 64 tokens"):
        check_length("x", network, 65)
