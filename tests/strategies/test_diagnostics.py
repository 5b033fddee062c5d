"""The diagnostics line against dense matrices, in both ways of computing it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State
from strategies.diagnostics import Diagnostics
from strategies.registry import make_rule
from tests.strategies.federations import Federation, effective, federations, numpy


def dense(before: State, after: State, updates: list[ClientUpdate]) -> Diagnostics:
    """The definitions, word for word, with (out, in) matrices."""
    total = sum(u.weight for u in updates)
    p = [u.weight / total for u in updates]
    moved = {n: effective(after)[n] - effective(before)[n] for n in before.adapters}
    changes = [
        {n: numpy(u.adapters[n].delta()) - numpy(f.delta()) for n, f in before.adapters.items()}
        for u in updates
    ]
    asked = {n: sum(pk * c[n] for pk, c in zip(p, changes, strict=True)) for n in before.adapters}
    targets = {n: asked[n] + numpy(f.delta()) for n, f in before.adapters.items()}
    size = {k: np.sqrt(sum((c**2).sum() for c in changes[k].values())) for k in range(len(p))}
    above = below = 0.0
    for k in range(len(p)):
        for j in range(len(p)):
            if j != k:
                inner = sum((changes[k][n] * changes[j][n]).sum() for n in asked)
                above, below = above + p[k] * p[j] * inner, below + p[k] * p[j] * size[k] * size[j]
    ranks = []
    for change in asked.values():
        sigma = np.linalg.svd(change, compute_uv=False)
        if sigma[0] > 1e-9:
            ranks.append((sigma**2).sum() ** 2 / (sigma**4).sum())
    missed = sum(((moved[n] - asked[n]) ** 2).sum() for n in asked)
    norm = sum((a**2).sum() for a in asked.values())
    return Diagnostics(
        gap=float(np.sqrt(missed / norm)),
        update_norm=float(np.sqrt(norm)),
        cosine=float(above / below) if below else 1.0,
        effective_rank=float(np.mean(ranks)),
        energy_lost=float(missed / sum((t**2).sum() for t in targets.values())),
    )


def two_layers(shape: tuple[int, int]) -> Federation:
    """Three clients of unequal weights and scalings; one layer of a shape, and one of it turned."""
    return Federation(
        modules={
            "a": ModuleSpec(out_features=shape[0], in_features=shape[1]),
            "b": ModuleSpec(out_features=shape[1], in_features=shape[0]),
        },
        rank=3,
        scaling=2.0,
        clients=tuple(ClientSpec(partition_id=i, rank=3, scaling=1.0 + i) for i in range(3)),
        weights=(1.0, 2.0, 5.0),
        seed=4,
    )


@pytest.mark.parametrize("name", ["fedavg", "flexlora", "flora", "fedmomentum", "zero-padding"])
@pytest.mark.parametrize("shape", [(40, 50), (6, 9)], ids=["grams", "matrices"])
@pytest.mark.parametrize("layers", ["all", "one each"])
def test_each_figure_is_what_its_definition_says(name: str, shape: tuple[int, int], layers: str) -> None:
    """Also where the first two clients train one layer each, and have no product in the other's stack."""
    rule, federation = make_rule(name), two_layers(shape)
    if layers == "one each":
        first, second, third = federation.clients
        own = replace(first, modules=frozenset("a")), replace(second, modules=frozenset("b")), third
        federation = replace(federation, clients=own)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, given = rule.aggregate(before, updates)
    assert given is not None
    expected = dense(before, after, updates).as_dict()
    for key, value in given.as_dict().items():
        assert value == pytest.approx(expected[key], rel=1e-6, abs=1e-6), key
    assert given.effective_rank > 1.5


@pytest.mark.parametrize("shape", [(40, 50), (6, 9)], ids=["grams", "matrices"])
def test_a_target_that_goes_into_the_base_whole_leaves_no_gap_at_all(shape: tuple[int, int]) -> None:
    """FLoRA's is 0, not the 1e-8 of Gram matrices that cancel."""
    rule, federation = make_rule("flora"), two_layers(shape)
    before = federation.start(rule)
    _, given = rule.aggregate(before, federation.updates(rule, before))
    assert given is not None
    assert given.update_norm > 1.0
    assert (given.gap, given.energy_lost) == (0.0, 0.0)


@given(federation=federations(min_clients=2))
def test_figures_stay_within_their_ranges(federation: Federation) -> None:
    rule = make_rule("flexlora")
    before = federation.start(rule)
    _, given = rule.aggregate(before, federation.updates(rule, before))
    assert given is not None
    assert -1 <= given.cosine <= 1
    assert 0 <= given.energy_lost <= 1 + 1e-9
    assert (
        0
        <= given.effective_rank
        <= max(min(s.out_features, s.in_features) for s in federation.modules.values()) + 1e-6
    )


def _two(first: float, second: float) -> tuple[State, list[ClientUpdate]]:
    """Two clients whose B moves by these multiples of one matrix, in each of two layers."""
    rule = make_rule("fedavg")
    federation = Federation(
        modules={n: ModuleSpec(out_features=20, in_features=30) for n in ("a", "b")},
        rank=2,
        scaling=1.0,
        clients=tuple(ClientSpec(partition_id=i, rank=2, scaling=1.0) for i in range(2)),
        weights=(1.0, 3.0),
        seed=1,
    )
    before = federation.start(rule)
    updates = []
    for partition, factor in enumerate((first, second)):
        adapters = {}
        for name, f in before.adapters.items():
            move = federation.normal(f.B.shape, "move", name)
            adapters[name] = LoraFactors(f.A, f.B + factor * move, 1.0)
        updates.append(
            ClientUpdate(
                partition_id=partition, adapters=adapters, head={}, weight=federation.weights[partition]
            )
        )
    return before, updates


@pytest.mark.parametrize(
    ("first", "second", "cosine"), [(1.0, 2.0, 1.0), (1.0, -0.5, -1.0), (1e-3, 10.0, 1.0), (1.0, 0.0, 1.0)]
)
def test_the_cosine_sees_directions_only(first: float, second: float, cosine: float) -> None:
    before, updates = _two(first, second)
    _, given = make_rule("fedavg").aggregate(before, updates)
    assert given is not None
    assert given.cosine == pytest.approx(cosine, abs=1e-6)


def test_they_can_be_left_out_and_change_no_bit() -> None:
    before, updates = _two(1.0, 2.0)
    with_them, measured = make_rule("flora").aggregate(before, updates)
    without, nothing = make_rule("flora").aggregate(before, updates, diagnostics=False)
    assert measured is not None
    assert nothing is None
    for name, factors in with_them.adapters.items():
        assert torch.equal(factors.A, without.adapters[name].A)
    assert with_them.base[0].digest() == without.base[0].digest()
    assert replace(with_them, base=()).round == 1
