"""``model.quantization = "4bit"``: refused where it cannot be, and what it computes where bitsandbytes is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from clients.training.batched import train_cohort
from clients.training.train import train_local
from fedlora.config import ModelConfig, TrainConfig, from_flat
from fedlora.core.state import State
from fedlora.errors import ConfigError, RunFailed
from fedlora.models import AdaptedModel, AdapterCard, build_model, resolve_targets
from fedlora.models.export import load_adapter, save_adapter
from fedlora.models.quantized import FourBitLinear
from fedlora.models.shared_memory import put_together, take_apart
from fedlora.server.validate import check
from strategies.registry import RULES
from tests.clients.cohort.samples import member, task
from tests.clients.samples import BOTH, PAD, examples
from tests.models.samples import adapted, logits, random_adapters, random_patch, save_tiny_gpt2, token_batch

there = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
FOUR = ModelConfig(name="tiny", quantization="4bit")


def directory(path: Path) -> str:
    """A random BERT whose layers are as wide as blocks."""
    config = BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(path)
    return str(path)


def four_bit(path: Path) -> AdaptedModel:
    module = build_model(ModelConfig(name=directory(path), quantization="4bit"), 2, 0)
    return AdaptedModel(module, resolve_targets(module, ""))


def test_without_bitsandbytes_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = r"^model\.quantization = '4bit': bitsandbytes is not installed here \(pip install bitsandbytes\)"
    with pytest.raises(ConfigError, match=line):
        build_model(FOUR, 2, 0)


def test_other_quantisations_are_refused() -> None:
    why = r"^model\.quantization = '8bit' \(did you mean 4bit\?\): accepted are none, 4bit$"
    with pytest.raises(ConfigError, match=why):
        ModelConfig(quantization="8bit")


@pytest.mark.parametrize("name", RULES)
def test_what_moves_the_base_is_refused(name: str) -> None:
    config = from_flat({"model.quantization": "4bit", "strategy.name": name})
    if not RULES[name].facts.updates_base:
        check(config)
        return
    with pytest.raises(
        ConfigError, match=rf"^model\.quantization = '4bit': {name} adds to the base, .*fedavg"
    ):
        check(config)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"strategy.init-a": "pissa"}, "strategy.init-a = 'pissa' adds to the base"),
        ({"strategy.init-a": "lora-ga", "data.public": "x.jsonl"}, "strategy.init-a = 'lora-ga' adds to"),
        (
            {"strategy.name": "fed-sb", "strategy.options": '{"subspace": "public"}', "data.public": "x"},
            "fed-sb starts from a gradient of weights",
        ),
    ],
)
def test_what_reads_the_weights_is_refused(keys: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.quantization = '4bit': {line}"):
        check(from_flat({"model.quantization": "4bit", **keys}))


@there
def test_the_layers_of_the_base_are_packed_and_the_rest_is_not(tmp_path: Path) -> None:
    packed, whole = four_bit(tmp_path), adapted(str(tmp_path))
    assert whole.modules == packed.modules
    layers = [m for m in packed.module.modules() if isinstance(m, FourBitLinear)]
    assert len(layers) == 13  # 6 in each of two blocks, and the pooler
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert packed.module.classifier.weight.equal(whole.module.classifier.weight)
    assert all(2 * layer.weight.nbytes == layer.in_features * layer.out_features for layer in layers)


@there
def test_it_computes_what_the_rounded_weights_compute(tmp_path: Path) -> None:
    """Each number is the nearest of 16 levels times its block's largest, in passes of either direction."""
    packed, whole = four_bit(tmp_path).module, adapted(str(tmp_path)).module
    for name, layer in packed.named_modules():
        if isinstance(layer, FourBitLinear):
            W = whole.get_submodule(name).weight.detach()
            blocks = W.reshape(-1, 64)
            largest = blocks.abs().amax(dim=1, keepdim=True)
            nearest = ((blocks / largest)[..., None] - layer.levels).abs().argmin(dim=-1)
            rounded = (layer.levels[nearest] * largest).reshape(W.shape)
            assert 0.05 < float((rounded - W).norm() / W.norm()) < 0.15
            one_hot = torch.eye(layer.in_features, requires_grad=True)
            y = layer(one_hot)
            torch.testing.assert_close((y - layer.bias).T, rounded, rtol=1e-5, atol=1e-6)
            (back,) = torch.autograd.grad(y.sum(), one_hot)
            torch.testing.assert_close(back[0], rounded.sum(dim=0), rtol=1e-4, atol=1e-5)


@there
def test_training_sharing_and_export_work_on_it(tmp_path: Path) -> None:
    """Alone and in a cohort the same; in another process's memory the same bits; the export opens again."""
    model, data, batch = four_bit(tmp_path / "base"), examples(60, seed=3), token_batch()
    model.load(random_adapters(model.modules, 4), {}, trained=BOTH, train_head=True)
    before = logits(model.module, batch)
    result = train_local(model, data, np.arange(24), PAD, TrainConfig(), local_steps=3, seed=1)
    model.load(result.adapters, result.head)
    assert (logits(model.module, batch) - before).abs().max() > 1e-3

    settings = task(optimizer="sgd", learning_rate=0.1)
    members = [member(model, 0, steps=2), member(model, 1, steps=3)]
    both = train_cohort(model, members, settings)
    for one, found in zip(members, both, strict=True):
        alone = train_cohort(model, [one], settings)[0]
        for name, factors in alone.adapters.items():
            torch.testing.assert_close(found.adapters[name].B, factors.B, rtol=1e-4, atol=1e-5)

    four = ModelConfig(name=str(tmp_path / "base"), quantization="4bit")
    pristine = build_model(four, 2, 0)
    again = put_together(*take_apart(pristine))
    assert logits(again, batch).equal(logits(pristine, batch))

    state = State(round=1, adapters=result.adapters, head=result.head)
    card = AdapterCard(model=four, label_names=("a", "b"), max_length=32, seed=0)
    save_adapter(tmp_path / "adapter", state, model.initial_head, card)
    exported, _ = load_adapter(tmp_path / "adapter")
    model.load(result.adapters, result.head)
    torch.testing.assert_close(logits(exported, batch), logits(model.module, batch), rtol=1e-4, atol=1e-5)


@there
def test_its_weights_take_no_patch_and_are_not_read(tmp_path: Path) -> None:
    model = four_bit(tmp_path)
    line = r"is held in 4 bits: its weight can neither be read nor take a patch$"
    with pytest.raises(RunFailed, match=line):
        model.base.move([random_patch(model.modules, 2, 0)])
    with pytest.raises(RunFailed, match=line):
        model.base.pristine(next(iter(model.modules)))


@there
def test_conv1d_is_refused(tmp_path: Path) -> None:
    name = str(save_tiny_gpt2(tmp_path / "gpt2"))
    with pytest.raises(
        ConfigError, match=r"has layers of type Conv1D, only nn\.Linear can be held in 4 bits"
    ):
        build_model(ModelConfig(name=name, quantization="4bit"), 2, 0)


@there
def test_widths_that_blocks_would_cross_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"query of 'tiny' has 32 inputs, must be a multiple of 64$"):
        build_model(FOUR, 2, 0)
