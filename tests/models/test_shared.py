"""A model taken apart and put together on arrays that nobody may write to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from fedlora.config import ModelConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.models.shared_memory import hashes, put_together, take_apart

SIZES: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> nn.Module:
    return GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, **SIZES))


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SIZES
    )
    return LlamaForSequenceClassification(config)


def tiny() -> nn.Module:
    return build_model(ModelConfig(name="tiny"), num_labels=3, seed=0)


def locked(arrays: list[np.ndarray]) -> list[np.ndarray]:
    for array in arrays:
        array.flags.writeable = False
    return arrays


@pytest.mark.parametrize("kind", [tiny, gpt2, llama])
def test_it_is_the_same_model_on_the_arrays_themselves(kind: Any) -> None:
    model = kind().eval()
    structure, arrays = take_apart(model)
    again = put_together(structure, locked([array.copy() for array in arrays])).eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model(**given).logits, again(**given).logits)
    assert len(structure) < 20_000 < sum(array.nbytes for array in arrays)

    structure, arrays = take_apart(model)
    places = {array.ctypes.data for array in arrays}
    assert {p.data_ptr() for p in put_together(structure, arrays).parameters()} <= places


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.outer = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.outer.weight = self.inner.weight
        self.register_buffer("flags", torch.tensor([True, False]))
        self.table = torch.arange(6.0).reshape(2, 3).T
        self.nothing = torch.empty(0, 4)
        self.inner.bias.requires_grad_(False)


def test_tied_tensors_stay_one_and_other_types_and_views_keep_their_bits() -> None:
    model: Any = Odd()
    again: Any = put_together(*take_apart(model))
    assert again.outer.weight is again.inner.weight
    assert torch.equal(again.inner.weight, model.inner.weight)
    assert torch.equal(again.flags, model.flags)
    assert torch.equal(again.table, model.table)
    assert again.nothing.shape == (0, 4)
    assert [p.requires_grad for p in again.inner.parameters()] == [True, False]


def test_training_and_serving_clients_never_write_into_the_arrays() -> None:
    """Locked pages would end the process; torch ignores NumPy's flag, so that the bytes are compared."""
    structure, arrays = take_apart(tiny())
    before = [array.tobytes() for array in arrays]
    network = put_together(structure, arrays)
    model = AdaptedModel(network, resolve_targets(network, ""))
    template = model.template(2, 1.0)
    adapters = fresh_adapters(template.modules, 2, 1.0, 0)
    model.load(adapters, template.head, trained=frozenset("AB"), train_head=True)
    ids = torch.arange(3, 15).reshape(2, 6)
    with model.training() as trained:
        optimizer = torch.optim.SGD(trained.all, lr=1.0)
        model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
        optimizer.step()
    assert [array.tobytes() for array in arrays] == before


def test_a_hash_tells_any_change_of_a_base_weight() -> None:
    network = tiny()
    model = AdaptedModel(network, resolve_targets(network, "query"))
    before = model.base_digests()
    assert not set(before) & set(model.initial_head)
    for name, tensor in {**dict(network.named_parameters()), **dict(network.named_buffers())}.items():
        if name in before:
            old = tensor.data.reshape(-1)[0].clone()
            tensor.data.reshape(-1)[0] += 1
            changed = {n for n, digest in model.base_digests().items() if digest != before[n]}
            assert changed == {name}
            tensor.data.reshape(-1)[0] = old
    assert model.base_digests() == before
    assert hashes({"a": torch.zeros(2)}) != hashes({"a": torch.zeros(3)})
