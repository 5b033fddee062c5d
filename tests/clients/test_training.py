"""The plain trainer against what it must equal, written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clients.training.batches import load_batch, shuffled_batches
from clients.training.train import batch_loss, train_local
from fedlora.config import TrainConfig
from fedlora.core.seeding import stream
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from tests.clients.measures import distance, same_bits, tensors, values
from tests.clients.samples import PAD, everyone, examples, loaded, reload

DATA = examples()
ALL = everyone(DATA)
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}


def train(
    model: AdaptedModel, *, local_steps: int = 3, seed: int = 1, indices: Any = ALL, **config: Any
) -> Any:
    return train_local(model, DATA, indices, PAD, TrainConfig(**config), local_steps=local_steps, seed=seed)


def by_hand(
    model: AdaptedModel,
    steps: int,
    batch_size: int,
    mu: float = 0.0,
    head_rate: float = 0.1,
    clip: float = 0.0,
) -> dict[str, torch.Tensor]:
    """SGD at 0.1 on the written-out loss, on the batches of seed 1."""
    with model.training() as trained:
        named = {**trained.factors, **trained.head}
        start = {name: p.detach().clone() for name, p in named.items()}
        for drawn in shuffled_batches(ALL, batch_size, steps, stream(1, "batches")):
            loss = batch_loss(model, load_batch(DATA, drawn, PAD, model.device))
            loss = loss + mu / 2 * sum((p - start[n]).square().sum() for n, p in named.items())
            gradients = torch.autograd.grad(loss, list(named.values()))
            norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
            factor = min(1.0, clip / norm) if clip else 1.0
            with torch.no_grad():
                for (name, p), g in zip(named.items(), gradients, strict=True):
                    p -= (head_rate if name in trained.head else 0.1) * factor * g
    return values(model)


def assert_close(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-6
) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("config", "hand"),
    [
        ({}, {}),
        ({"head_learning_rate": 0.5}, {"head_rate": 0.5}),
        ({"proximal_mu": 2.0}, {"mu": 2.0}),
        ({"max_grad_norm": 0.05}, {"clip": 0.05}),
        ({"max_grad_norm": 0.05, "proximal_mu": 2.0}, {"clip": 0.05, "mu": 2.0}),
    ],
)
def test_sgd_equals_the_loop_written_out(config: dict[str, float], hand: dict[str, float]) -> None:
    result = train(loaded(), local_steps=4, batch_size=5, **SGD, **config)
    assert_close(tensors(result), by_hand(loaded(), 4, 5, **hand))


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (
            {"learning_rate": 0.01, "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        ),
        (
            {**SGD, "momentum": 0.9, "weight_decay": 0.1},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_the_optimiser_is_torchs(config: Any, make: Any) -> None:
    model = loaded()
    result = train(model, batch_size=24, local_steps=3, **config)
    reload(model)
    with model.training() as trained:
        optimizer = make(trained.all)
        for drawn in shuffled_batches(ALL, 24, 3, stream(1, "batches")):
            optimizer.zero_grad()
            batch_loss(model, load_batch(DATA, drawn, PAD, model.device)).backward()
            optimizer.step()
    assert_close(tensors(result), values(model))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_gives_the_same_bits(dropout: float) -> None:
    model = loaded(dropout=dropout)
    first = train(model)
    torch.rand(3)
    reload(model, 8)
    train(model, seed=5)
    reload(model, dropout=dropout)
    assert same_bits(first, train(model))
    reload(model, dropout=dropout)
    assert not same_bits(first, train(model, seed=2))


def test_dropout_draws_from_the_seed() -> None:
    """With a single example only dropout can tell two seeds apart."""
    one, again, other = (
        train(loaded(dropout=0.5), indices=ALL[:1], local_steps=1, seed=s, **SGD) for s in (1, 1, 2)
    )
    without = train(loaded(), indices=ALL[:1], local_steps=1, **SGD)
    assert same_bits(one, again)
    assert distance(tensors(one), tensors(other)) > 1e-4
    assert distance(tensors(one), tensors(without)) > 1e-4


def test_the_global_random_state_is_left_alone() -> None:
    model = loaded(dropout=0.5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(model)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


def test_training_learns() -> None:
    model = loaded()
    before = train(model, batch_size=24, local_steps=1, learning_rate=1e-9).loss
    reload(model)
    train(model, batch_size=8, local_steps=40, learning_rate=0.02)
    after = train(model, batch_size=24, local_steps=1, learning_rate=1e-9).loss
    assert after < 0.5 * before


@pytest.mark.parametrize("trained", [frozenset("A"), frozenset("B"), frozenset()])
def test_what_is_not_trained_keeps_its_bits(trained: frozenset[str]) -> None:
    for train_head in {True, bool(not trained)}:
        model = loaded(trained=trained, train_head=train_head)
        before = values(model)
        train(model)
        changed = {name for name, t in values(model).items() if not torch.equal(t, before[name])}
        head = set(model.initial_head) if train_head else set()
        assert changed == {f"{name}.{letter}" for name in model.modules for letter in trained} | head


def test_only_the_chosen_modules_are_trained() -> None:
    model = loaded()
    chosen = frozenset(list(model.modules)[:1])
    reload(model, modules=chosen, train_head=False)
    before = values(model)
    result = train(model)
    changed = {name for name, t in values(model).items() if not torch.equal(t, before[name])}
    assert changed == {f"{name}.{letter}" for name in chosen for letter in "AB"}
    assert result.head == {}


def test_the_base_is_not_touched() -> None:
    model = loaded(dropout=0.2)
    before = {name: p.clone() for name, p in model.module.state_dict().items() if "lora_" not in name}
    train(model)
    after = model.module.state_dict()
    assert {name for name, t in before.items() if not torch.equal(t, after[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert not any(module.training for module in model.module.modules())
    assert all(p.grad is None for p in model.module.parameters())


def test_a_proximal_term_keeps_a_client_near_its_start() -> None:
    start = values(loaded())
    far, near = (
        distance(tensors(train(loaded(), local_steps=20, proximal_mu=mu, **SGD)), start) for mu in (0.0, 5.0)
    )
    assert 0 < near < 0.7 * far


def test_a_clipped_step_is_never_longer_than_the_bound() -> None:
    start = values(loaded())
    moved = distance(tensors(train(loaded(), local_steps=1, max_grad_norm=0.01, **SGD)), start)
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_client_with_fewer_examples_than_a_batch() -> None:
    result = train(loaded(), indices=ALL[:3], batch_size=8, local_steps=5)
    assert (result.num_examples, result.steps) == (3, 5)
    result = train(loaded(), indices=ALL[:3], batch_size=2, local_epochs=3)
    assert (result.num_examples, result.steps) == (3, 6)


def test_the_reported_loss_is_the_mean_over_the_examples_seen() -> None:
    model = loaded()
    with torch.no_grad():
        expected = batch_loss(model, load_batch(DATA, ALL, PAD, model.device))
    result = train(model, batch_size=7, local_epochs=1, learning_rate=1e-9)
    assert result.loss == pytest.approx(float(expected), rel=1e-5)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is trained"):
        train(loaded(trained=frozenset(), train_head=False))
    with pytest.raises(ConfigError, match="no training example"):
        train(loaded(), indices=ALL[:0])


def test_loraplus_moves_b_faster_than_a() -> None:
    """One step of SGD from the same start: B goes ``ratio`` times as far, A and the head as far as before."""
    moves = []
    for ratio in (1.0, 8.0):
        model = loaded()
        start = model.read()
        config = TrainConfig(optimizer="sgd", learning_rate=0.1, batch_size=24, loraplus_lr_ratio=ratio)
        result = train_local(model, DATA, everyone(DATA), PAD, config, local_steps=1, seed=0)
        name = next(iter(start[0]))
        ends, begun = result.adapters[name].tensors(), start[0][name].tensors()
        head = next(iter(start[1]))
        moves.append((ends["A"] - begun["A"], ends["B"] - begun["B"], result.head[head] - start[1][head]))
    one, eight = moves
    for place, factor in ((0, 1), (1, 8), (2, 1)):
        torch.testing.assert_close(eight[place], factor * one[place], rtol=1e-4, atol=1e-6)
