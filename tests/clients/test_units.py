"""Private steps whose unit is a person with several examples: the mean of them is clipped, not each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.training import dp_step
from clients.training.batched import train as batched
from clients.training.batched.self_check import check_cohort
from clients.training.batches import load_batch
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_step import private_steps
from clients.training.made_up import clipped
from clients.training.self_check import self_check
from clients.training.train import batch_loss
from clients.training.units import Units, open_units
from fedlora.config import TrainConfig
from fedlora.errors import ConfigError, RunFailed
from fedlora.models import AdaptedModel
from tests.clients.cohort import samples
from tests.clients.samples import PAD, examples, loaded, train_by_dp_sgd

WHOSE = np.repeat([5, 2, 9, 7, 4], [1, 2, 3, 6, 12]).astype(np.int32)
DATA = replace(examples(), units=np.random.default_rng(1).permutation(WHOSE))
EVERYONE = np.arange(24)
HOOKS = Mechanism(noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=3, unit_examples=12)
WAYS = {
    "hooks": HOOKS,
    "loop": replace(HOOKS, grad_sample_mode="loop"),
    "per-layer": replace(HOOKS, clipping="per-layer"),
    "chunks": replace(HOOKS, max_physical_batch_size=12),
}


def means(model: AdaptedModel, units: Sequence[np.ndarray]) -> list[Tensor]:
    """Each unit's mean gradient, (units, *shape) for each trained tensor."""
    trained = model.trainable()
    found = []
    for own in units:
        loss = batch_loss(model, load_batch(DATA, own, PAD, model.device))
        found.append(torch.autograd.grad(loss, [*trained.factors.values(), *trained.head.values()]))
    return [torch.stack(column) for column in zip(*found, strict=True)]


def step(model: AdaptedModel, mechanism: Mechanism, drawn: np.ndarray, units: Units) -> list[Tensor]:
    """What one step without noise moves by, not divided by the batch size."""
    with model.training() as trained:
        parameters = [*trained.factors.values(), *trained.head.values()]
        sgd = torch.optim.SGD(parameters, lr=1.0)
        with private_steps(model, sgd, mechanism, units=units) as private:
            private.step(DATA, drawn, PAD)
        return [p.grad * mechanism.expected_batch_size for p in parameters if p.grad is not None]


@pytest.mark.parametrize("mechanism", WAYS.values(), ids=WAYS)
def test_a_step_is_the_sum_of_clipped_means(mechanism: Mechanism) -> None:
    model = loaded()
    units = Units(DATA, EVERYONE, 12, np.random.default_rng(0))
    drawn = units.everyone[[0, 2, 3, 4]]
    own = [np.flatnonzero(DATA.units == DATA.units[unit]) for unit in drawn]
    with model.training():
        gradients = means(model, own)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    clip = float(norms.median())
    wanted = clipped(gradients, clip, mechanism.clipping)
    found = step(model, replace(mechanism, max_grad_norm=clip), drawn, units)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other.sum(dim=0)).abs().max() <= 1e-5 * other.abs().max()


def test_no_unit_counts_for_more_than_the_bound_however_much_it_has() -> None:
    model = loaded()
    units = Units(DATA, EVERYONE, 12, np.random.default_rng(0))
    for unit in units.everyone:
        moved = step(model, replace(HOOKS, max_grad_norm=1e-3), np.array([unit]), units)
        assert 0.9e-3 < torch.stack([m.norm() for m in moved]).norm() < 1.001e-3


def test_of_a_large_unit_so_many_examples_are_drawn_each_time() -> None:
    units = Units(DATA, EVERYONE, 4, np.random.default_rng(0))
    large = next(u for u in units.everyone if DATA.units[u] == 4)
    drawn = [units.rows(np.array([large]))[0] for _ in range(200)]
    assert all(len(set(rows.tolist())) == 4 for rows in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=24)
    assert (counts > 0).sum() == 12
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(DATA.units == 4))
    rows, owners = units.rows(units.everyone)
    assert np.bincount(owners).tolist() == [
        min(4, (DATA.units == DATA.units[u]).sum()) for u in units.everyone
    ]
    assert all(
        DATA.units[row] == DATA.units[units.everyone[own]] for row, own in zip(rows, owners, strict=True)
    )


def test_rate_and_draws_go_by_units() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch-size = 6: .* or units"):
        trained(batch_size=6)
    assert trained(batch_size=5).num_examples == 24


def trained(batch_size: int = 2, **options: Any) -> Any:
    return train_by_dp_sgd(
        loaded(), DATA, EVERYONE, PAD, TrainConfig(batch_size=batch_size, optimizer="sgd"), local_steps=3,
        noise_multiplier=1.0, max_grad_norm=0.5, seed=1, unit_examples=4, **options,
    )  # fmt: skip


def test_the_same_seed_trains_the_same_and_the_system_draws_anew() -> None:
    once, again, secure = trained(), trained(), trained(secure=True)
    for name, factors in once.adapters.items():
        assert torch.equal(factors.A, again.adapters[name].A)
        assert not torch.equal(factors.A, secure.adapters[name].A)


def test_examples_that_do_not_say_whose_they_are_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.unit-column: .* do not say whose"):
        open_units(examples(), EVERYONE, 4, 0)


def test_a_unit_of_which_one_example_overflows_counts_as_zero() -> None:
    model = loaded()
    embedding = model.module.backbone.get_input_embeddings().weight
    before = embedding.detach().clone()
    odd = next(i for i in EVERYONE[1:] if DATA.input_ids(i)[0] not in DATA.input_ids(0))
    try:
        with torch.no_grad():
            embedding[DATA.input_ids(odd)[0]] = torch.inf
        units = Units(DATA, EVERYONE[:1], 4, np.random.default_rng(0))
        assert any(m.any() for m in step(model, HOOKS, units.everyone, units))
        one = replace(DATA, units=np.zeros(24, dtype=np.int32))
        units = Units(one, np.array([0, odd]), 4, np.random.default_rng(0))
        assert all((m == 0).all() for m in step(model, HOOKS, units.everyone, units))
    finally:
        with torch.no_grad():
            embedding.copy_(before)


# In cohorts


@pytest.fixture(scope="module")
def network() -> AdaptedModel:
    return samples.model()


@pytest.mark.parametrize("options", [{}, {"clipping": "per-layer"}, {"max_physical_batch_size": 5}], ids=str)
def test_clients_come_out_as_if_alone(network: AdaptedModel, options: dict[str, Any]) -> None:
    whose = np.random.default_rng(3).integers(0, 20, len(samples.DATA)).astype(np.int32)
    data = replace(samples.DATA, units=whose)
    members = [samples.member(network, k, rank=2 + k, steps=2 + k, size=20) for k in range(3)]
    members = samples.privately(members, unit_examples=2, **options)
    samples.assert_same(network, members, samples.task(data, dropout=0.3))


# What checks find


@pytest.mark.parametrize("mechanism", WAYS.values(), ids=WAYS)
def test_the_self_test_passes(mechanism: Mechanism) -> None:
    self_check(loaded(), PAD, replace(mechanism, noise_multiplier=0.8))
    check_cohort(loaded(), PAD, replace(mechanism, noise_multiplier=0.8))


@pytest.mark.parametrize("mechanism", WAYS.values(), ids=WAYS)
def test_the_self_test_finds_examples_clipped_one_by_one(
    mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dp_step, "join_at", lambda *arguments: None)
    with pytest.raises(RunFailed, match=r"per-example gradients of .*: shape"):
        self_check(loaded(), PAD, replace(mechanism, noise_multiplier=0.8))


def test_the_self_test_finds_a_sum_in_place_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_step, "shares", lambda owners: np.ones(len(owners), dtype=np.float32))
    with pytest.raises(RunFailed, match=r"per-example gradients of .*: wrong on this model"):
        self_check(loaded(), PAD, replace(HOOKS, noise_multiplier=0.8))


def test_the_cohorts_self_test_finds_examples_clipped_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched.Cohort, "_of_units", rows_by_themselves)
    with pytest.raises(RunFailed, match=r"the clipped sum of .* is not that of its clients"):
        check_cohort(loaded(), PAD, replace(HOOKS, noise_multiplier=0.8))


def rows_by_themselves(self: Any, wave: Any, most: int) -> Any:
    """Examples as if each were a unit."""
    rows = batched.gather(
        self._task.examples, [s.units.rows(b)[0] for s, b in zip(self._streams, wave, strict=False)]
    )
    found: list[Any] = []
    for walked in self._passes(rows, by_example=True):
        walked.losses.sum().backward()
        found.append((walked.gradients(), walked.clients))
    gradients = {name: torch.cat([g[name] for g, _ in found]) for name in found[0][0]}
    return gradients, torch.cat([clients for _, clients in found])
