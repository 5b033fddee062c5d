"""``train.packing`` and ``train.micro-batch-size``: the same steps, from rows without padding or in parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from clients.training.batches import load_batch
from clients.training.packing_check import check_packing
from clients.training.train import batch_loss, train_local
from fedlora.config import TrainConfig
from fedlora.data.examples import Examples
from fedlora.data.packing import NOBODY, collate_packed, first_fit
from fedlora.errors import ConfigError, NotApplicable
from fedlora.models import AdaptedModel
from fedlora.server.validate import check
from tests.clients.cohort.samples import member, task, together
from tests.clients.cohort.samples import model as cohort_model
from tests.clients.samples import BOTH
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values
from tests.models.language import ARCHITECTURES, adapted_lm, save_tiny_lm
from tests.models.samples import random_adapters

CPU = torch.device("cpu")
LENGTHS = (3, 17, 9, 2, 30, 11, 5, 8)


def texts(*, counted: bool) -> Examples:
    """Examples of unequal length; of a conversation about half of the tokens count."""
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *LENGTHS])
    marks = (rng.random(offsets[-1]) < 0.5).astype(np.uint8)
    marks[offsets[1:] - 1] = 1
    return Examples(
        tokens=rng.integers(3, 190, offsets[-1]).astype(np.int32),
        offsets=offsets,
        labels=np.zeros(len(LENGTHS), dtype=np.int64),
        domains=np.zeros(len(LENGTHS), dtype=np.int32),
        counted=marks if counted else None,
    )


def loaded(model: AdaptedModel) -> AdaptedModel:
    model.load(random_adapters(model.modules, 4, 2.0, 0), {}, trained=BOTH)
    return model


def gradient(
    model: AdaptedModel, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with model.training() as trained:
        losses = batch_loss(model, dict(batch), reduction="none")
        return losses.detach(), list(torch.autograd.grad(losses.mean(), trained.all))


@pytest.mark.parametrize("capacity", [0, 40, 200])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_losses_and_gradients_are_those_of_padded_rows(
    architecture: str, counted: bool, capacity: int, tmp_path: Path
) -> None:
    model = loaded(adapted_lm(str(save_tiny_lm(tmp_path, architecture)), "all-linear"))
    data, order = texts(counted=counted), np.array([5, 0, 1, 7, 2, 3, 4, 6])
    packed = collate_packed(data, order, 0, capacity)
    padded = load_batch(data, order, 0, CPU)
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    (losses, found), (wanted_losses, wanted) = gradient(model, packed), gradient(model, padded)
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    check_packing(model, 0)


def test_every_token_is_in_one_place_and_the_first_of_an_example_never_counts() -> None:
    data, order = texts(counted=True), np.array([5, 0, 1, 7])
    batch = {name: part.numpy() for name, part in collate_packed(data, order, 0).items()}
    for place, index in enumerate(order):
        own = batch["segments"] == place
        assert batch["input_ids"][own].tolist() == data.input_ids(index).tolist()
        assert batch["position_ids"][own].tolist() == list(range(LENGTHS[index]))
        assert data.counted is not None
        marks = data.counted[data.offsets[index] : data.offsets[index + 1]]
        assert batch["counted"][own].tolist() == [0, *marks[1:]]
    rest = batch["segments"] == NOBODY
    assert rest.sum() == rest.size - sum(LENGTHS[index] for index in order)
    assert not batch["counted"][rest].any()


def test_rows_are_filled_and_never_beyond() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(1, 20, rng.integers(1, 30)).tolist()
        rows = first_fit(lengths, 25)
        assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
        sums = [sum(lengths[place] for place in row) for row in rows]
        assert max(sums) <= 25
        assert sum(total <= 12 for total in sums) <= 1  # two such rows would be one


@pytest.mark.parametrize(
    "keys", [{"packing": True}, {"micro_batch_size": 3}, {"packing": True, "micro_batch_size": 3}]
)
def test_steps_come_out_the_same(keys: dict[str, Any]) -> None:
    """Plain training over several steps, with clipping, a proximal term and a last batch that is smaller."""
    data, results = texts(counted=True), []
    settings = {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "batch_size": 5,
        "proximal_mu": 0.1,
        "max_grad_norm": 0.5,
    }
    for own in ({}, keys):
        model = loaded(adapted_lm())
        config = TrainConfig(**settings, **own)
        results.append(train_local(model, data, np.arange(8), 0, config, local_steps=4, seed=1))
    plain, other = results
    assert other.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, adapter in plain.adapters.items():
        for factor, tensor in adapter.tensors().items():
            torch.testing.assert_close(other.adapters[name].tensors()[factor], tensor, rtol=1e-5, atol=1e-6)


def test_a_cohort_in_parts_is_the_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no pass holds more rows than asked for."""
    network, rows = cohort_model(), list[int]()
    members = [member(network, number, steps=3) for number in range(3)]
    whole, losses = together(network, members, task(batch_size=5))

    def counting(examples: Any, indices: Any, *rest: Any) -> Any:
        rows.append(len(indices))
        return load_batch(examples, indices, *rest)

    monkeypatch.setattr("clients.training.batched.train.load_batch", counting)
    parts, others = together(network, members, task(batch_size=5, micro_batch_size=2))
    assert max(rows) == 2
    assert others == pytest.approx(losses, rel=1e-9)
    for wanted, found in zip(whole, parts, strict=True):
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)


class Blind(nn.Module):
    """A model in which every token sees all before it in its row, whatever its position says."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, attention_mask: Any = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))


def test_a_model_whose_examples_see_each_other_is_refused() -> None:
    model = adapted_lm()
    model.module = Blind(model.module)
    with pytest.raises(
        ConfigError, match=r"^train.packing = true: the gradient of \S+ is not that of single"
    ):
        check_packing(loaded(model), 0)


def test_a_model_with_a_state_instead_of_attention_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 0}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path)
    model = loaded(adapted_lm(str(tmp_path), "in_proj"))
    with pytest.raises(ConfigError, match=r"^train.packing = true: .* must be false with this model$"):
        check_packing(model, 0)


LM = {"model.name": "tiny-lm", "task": "causal-lm", "engine.cohort-size": 1}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"train.packing": True}, "train.packing = true: task classification has no sequences to pack"),
        (
            {**LM, "train.packing": True, "privacy.mode": "example"},
            "train.packing = true: a private example must be a row of its own to be clipped",
        ),
        (
            {**LM, "train.packing": True, "engine.cohort-size": 4},
            "train.packing = true: packed clients train alone, engine.cohort-size = 4 must be 1",
        ),
        (
            {"train.micro-batch-size": 4, "privacy.mode": "example"},
            "train.micro-batch-size = 4: must be 0 where examples are private, "
            "privacy.max-physical-batch-size is that there",
        ),
        (
            {"train.micro-batch-size": 4, "lora.dropout": 0.1},
            "train.micro-batch-size = 4: cohorts draw the dropout masks of a whole step; with "
            "lora.dropout = 0.1 engine.cohort-size must be 1",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(keys: dict[str, Any], line: str) -> None:
    with pytest.raises((ConfigError, NotApplicable)) as caught:
        check(tiny_config(**keys))
    assert str(caught.value) == line


@pytest.mark.parametrize("keys", [{"train.packing": True}, {"train.micro-batch-size": 3}])
def test_a_run_is_what_it_was(keys: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    plain, other = (
        run(tmp_path / str(number), **LM, **own, **{"data.max-length": 32, "num-server-rounds": 1})
        for number, own in enumerate(({}, keys))
    )
    found, wanted = values(other), values(plain)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
