"""A cohort against the one-by-one trainer, in float64: unequal ranks, data, batches, steps, everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.training.batched import Member, train_cohort
from clients.training.batched.train import Cohort
from fedlora.core.adapters import lora_set
from fedlora.core.directions import all_parted
from fedlora.core.state import RankRegularizer
from fedlora.models import AdaptedModel
from tests.clients.cohort.samples import (
    alone,
    assert_rested,
    assert_same,
    member,
    model,
    privately,
    starts,
    task,
    together,
)
from tests.models.samples import save_tiny_gpt2

SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}
CONFIGS: list[dict[str, Any]] = [
    {},
    SGD,
    {**SGD, "momentum": 0.9, "weight_decay": 0.1, "head_learning_rate": 0.5},
    {"weight_decay": 0.1, "head_learning_rate": 0.01, "loraplus_lr_ratio": 4.0},
    {"max_grad_norm": 0.3},
    {"proximal_mu": 0.5},
    {"dropout": 0.3},
    {**SGD, "dropout": 0.3, "max_grad_norm": 0.3, "proximal_mu": 0.5, "weight_decay": 0.1},
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(c) or "adamw")


def unequal(network: AdaptedModel) -> list[Member]:
    """Clients of other ranks, steps, and example counts: one has fewer examples than a batch."""
    return [
        member(network, 0, steps=2),
        member(network, 1, rank=2, size=7, steps=5),
        member(network, 2, rank=1, size=3, steps=3),
    ]


@every_config
def test_every_client_comes_out_as_if_alone(config: dict[str, Any], network: AdaptedModel) -> None:
    assert_same(network, unequal(network), task(**config))


@pytest.mark.parametrize("trained", ["A", "B"])
@pytest.mark.parametrize("config", [CONFIGS[3], CONFIGS[7]], ids=["adamw", "sgd"])
def test_one_factor_of_two(trained: str, config: dict[str, Any], network: AdaptedModel) -> None:
    members = [replace(m, trained=frozenset(trained)) for m in unequal(network)]
    assert_same(network, members, task(**config))


@pytest.mark.parametrize("trained", ["R", "ABR", "B"])
def test_cores(trained: str, network: AdaptedModel) -> None:
    members = [
        member(network, k, rank=rank, cored=1, trained=frozenset(trained), steps=2 + k)
        for k, rank in enumerate((3, 5, 2))
    ]
    assert_same(network, members, task(dropout=0.2, weight_decay=0.1))


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_cores_in_blocks(block: int, private: bool, network: AdaptedModel) -> None:
    """Of ranks 4, 6 and 2 times a block: a smaller one has fewer of them."""
    members = [
        member(network, k, rank=number * block, cored=number, trained=frozenset("R"), steps=2 + k)
        for k, number in enumerate((4, 3, 2))
    ]
    if private:
        assert_same(network, privately(members), task(weight_decay=0.1, max_grad_norm=0.0))
    else:
        assert_same(network, members, task(dropout=0.2, weight_decay=0.1))


@pytest.mark.parametrize("config", [CONFIGS[3], CONFIGS[7]], ids=["adamw", "sgd"])
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_clients_that_train_other_layers(
    config: dict[str, Any], private: bool, network: AdaptedModel
) -> None:
    """What a client does not train stays, bit by bit: neither weight decay nor noise moves it."""
    if private:
        config = {**config, "max_grad_norm": 0.0}
    names = list(network.modules)
    members = unequal(network)
    members[0] = replace(members[0], modules=frozenset(names[:1]))
    members[1] = replace(members[1], modules=frozenset(names[1:]), train_head=False)
    members[2] = replace(members[2], indices=members[0].indices)
    if private:
        members = privately(members)
    values = assert_same(network, members, task(**config))
    assert_rested(network, members, values)


def in_parts(network: AdaptedModel) -> list[Member]:
    """Clients some of whose directions rest: other ones in each layer, of one layer all, of another none."""
    first, second, *_ = network.modules
    training: dict[str, tuple[int, ...]] = {first: (1, 3), second: ()}
    members = [member(network, 0, steps=2), member(network, 1, rank=3, size=7, steps=5), member(network, 2)]
    return [
        replace(m, adapters=lora_set(all_parted(m.adapters, training)), modules=m.modules - {second})
        for m in members
    ]


IN_PARTS: list[dict[str, Any]] = [
    *(CONFIGS[k] for k in (3, 7)),
    {"optimizer": "lora-pro", "learning_rate": 0.1, "weight_decay": 0.1},
    {"optimizer": "scaled", "learning_rate": 0.1},
    {"optimizer": "adabelief", "weight_decay": 0.1},
]


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("config", IN_PARTS, ids=lambda c: str(c.get("optimizer", "adamw")))
def test_directions_at_rest_stay_and_the_others_train_as_alone(
    config: dict[str, Any], private: bool, network: AdaptedModel
) -> None:
    """No weight decay, noise or step of the whole layer moves what rests, one by one and together."""
    members = in_parts(network)
    if private:
        members, config = privately(members), {**config, "max_grad_norm": 0.0}
    values = assert_same(network, members, task(**config))
    for one, found in zip(members, values, strict=True):
        begun = starts(network, one)
        for name, tensor in found.items():
            letter = name.rpartition(".")[2]
            if letter in ("A0", "B0") or name.rpartition(".")[0] in network.modules.keys() - one.modules:
                assert torch.equal(tensor, begun[name]), name
            elif letter in "AB":
                assert not torch.equal(tensor, begun[name]), name


def test_gradients_of_directions_are_those_in_the_whole_layer(network: AdaptedModel) -> None:
    """SGD's one step on some directions, against the same rows of a step on all of them."""
    (parts,) = in_parts(network)[:1]
    parts = replace(parts, steps=1)
    whole = replace(parts, adapters=member(network, 0).adapters)
    some, _ = alone(network, parts, task(**SGD, dropout=0.3))
    everything, _ = alone(network, whole, task(**SGD, dropout=0.3))
    first, _second, third, *_ = network.modules
    torch.testing.assert_close(some[f"{first}.A"], everything[f"{first}.A"][[1, 3]])
    torch.testing.assert_close(some[f"{first}.B"], everything[f"{first}.B"][:, [1, 3]])
    torch.testing.assert_close(some[f"{third}.A"], everything[f"{third}.A"])


def test_no_head_and_one_client(network: AdaptedModel) -> None:
    members = [replace(m, train_head=False) for m in unequal(network)]
    assert_same(network, members, task())
    assert_same(network, members[1:2], task(dropout=0.1))


def test_tail_penalties_of_each_client(network: AdaptedModel) -> None:
    tails = (RankRegularizer(weight=0.3, start=2), RankRegularizer(weight=0.9, start=1), None)
    members = [replace(m, tail=tail) for m, tail in zip(unequal(network), tails, strict=True)]
    values = assert_same(network, members, task(**SGD))
    without, _ = together(network, unequal(network), task(**SGD))
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(values, without, strict=True)]
    assert moved == [True, True, False]


def test_whole_passes_over_unequal_data(network: AdaptedModel) -> None:
    members = [
        replace(m, steps=2 * -(-len(m.indices) // 4)) for m in unequal(network)
    ]  # as `num_steps` counts two epochs
    assert_same(network, members, task(local_epochs=2))


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_decoders_and_their_own_heads(pooling: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """GPT-2: Conv1D, layers that are not square, a head on every token."""
    path = save_tiny_gpt2(tmp_path_factory.mktemp("gpt2"))
    network = model(name=str(path), pooling=pooling, targets="c_attn,c_fc")
    data = task(dropout=0.2)
    small = replace(data.examples, tokens=data.examples.tokens % 190 + 3)
    members = [member(network, 0), member(network, 1, rank=2, steps=2)]
    assert_same(network, members, replace(data, examples=small, pad_token_id=2))


def test_a_layer_on_one_vector_for_each_example(network: AdaptedModel) -> None:
    """BERT's pooler sees no tokens, but draws dropout like the rest."""
    pooled = model(pooling="model", targets="pooler.dense,value")
    assert_same(pooled, [member(pooled, 0), member(pooled, 1, rank=2, steps=2)], task(dropout=0.3))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(c) or "adamw")
def test_float32(config: dict[str, Any]) -> None:
    """Through the packed products: 1e-5 of each tensor with SGD; AdamW divides rounding by itself."""
    network = model(torch.float32)
    members = unequal(network)
    values, _ = together(network, members, task(**config))
    for one, found in zip(members, values, strict=True):
        wanted, _ = alone(network, one, task(**config))
        for name, tensor in wanted.items():
            tolerance = 1e-5 if config.get("optimizer") == "sgd" else 1e-3
            assert _far(found[name], tensor) <= tolerance, name


def _far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_filling_has_no_gradient_and_stays_zero(network: AdaptedModel) -> None:
    members = unequal(network)
    cohort = Cohort(network, members, task(weight_decay=0.1))
    with cohort.route_laid():
        gradients = cohort.plain([m.indices[:2] for m in members])
    for name in network.modules:
        for place, one in enumerate(members):
            assert not gradients[f"{name}.A"][place, one.rank :].any()
            assert not gradients[f"{name}.B"][place, :, one.rank :].any()
            assert gradients[f"{name}.A"][place, : one.rank].any()
            assert gradients[f"{name}.B"][place, :, : one.rank].any()


def test_results_are_in_the_order_of_the_members(network: AdaptedModel) -> None:
    members = unequal(network)
    results = train_cohort(network, members, task())
    assert [r.steps for r in results] == [2, 5, 3]
    assert [r.num_examples for r in results] == [12, 7, 3]
    assert [next(iter(r.adapters.values())).rank for r in results] == [4, 2, 1]
    for one, result in zip(members, results, strict=True):
        wanted, _ = alone(network, one, task())
        for name, factors in result.adapters.items():
            for letter, tensor in factors.tensors().items():
                torch.testing.assert_close(tensor.double(), wanted[f"{name}.{letter}"], rtol=1e-6, atol=1e-9)


def test_what_overflows_at_one_client_stays_there(network: AdaptedModel) -> None:
    members = unequal(network)
    broken = dict(members[1].adapters)
    name = next(iter(broken))
    broken[name] = replace(broken[name], A=broken[name].A * float("inf"))
    for kind in (members, privately(unequal(network)[:2])):
        whole, _ = together(network, kind, task(dropout=0.1, max_grad_norm=0.0))
        spoilt = [kind[0], replace(kind[1], adapters=broken), *kind[2:]]
        found, _ = together(network, spoilt, task(dropout=0.1, max_grad_norm=0.0))
        assert any(not torch.isfinite(t).all() for t in found[1].values())
        for place in {0, *range(2, len(kind))}:
            assert all(torch.equal(t, whole[place][n]) for n, t in found[place].items())
