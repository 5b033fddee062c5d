"""FedEx-LoRA: what the averages miss, in few factors, in the right orientation, on a real model too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, Template
from strategies.layer import Weighted
from strategies.rules.fedex import FedExLoRARule, residual
from tests import oracles
from tests.models.samples import adapted, logits, random_adapters, save_tiny_gpt2, token_batch
from tests.strategies.federations import (
    Federation,
    federations,
    numpy,
    oracle_layer,
    relative,
)

RULE = FedExLoRARule()


@given(federation=federations(), rank=st.integers(1, 4))
def test_the_residual_is_exact_and_small(federation: Federation, rank: int) -> None:
    """Rank R - min r_k, or the layer's own; also where clients have more than the global rank r."""
    federation = replace(federation, rank=rank)
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    after, _ = RULE.aggregate(before, updates)
    moved = after.base[-1].products if after.base else {}
    lowest = min(rank, *(c.rank for c in federation.clients))
    bound = sum(c.rank for c in federation.clients) - lowest
    for name, factors in after.adapters.items():
        T = oracles.mean_update(oracle_layer(before, updates, name)[1])
        missed = T - numpy(factors.delta())
        if name not in moved:
            assert np.linalg.norm(missed) < 1e-12 * np.linalg.norm(T)
            continue
        assert np.linalg.norm(numpy(moved[name].dense()) - missed) < 1e-12 * (1 + np.linalg.norm(T))
        assert moved[name].rank_bound == min(bound, factors.out_features, factors.in_features)


def test_the_residual_beats_both_plain_factorisations() -> None:
    """Ranks 1, 1, 4: 5 columns, where padding to rank 4 has (m - 1) r = 8 and stacking R + r = 10."""
    g = torch.Generator().manual_seed(0)

    def drawn(rank: int) -> LoraFactors:
        A, B = torch.randn(rank, 14, generator=g), torch.randn(12, rank, generator=g)
        return LoraFactors(A.double(), B.double(), 2.0)

    clients = [Weighted(w, drawn(r)) for w, r in zip((0.2, 0.3, 0.5), (1, 1, 4), strict=True)]
    mean = drawn(4)
    assert residual(clients, mean).rank_bound == 5


@pytest.mark.parametrize("alone", [True, False], ids=["one client", "clients that agree"])
def test_where_the_averages_miss_nothing_the_base_stays(alone: bool) -> None:
    """Twice the same empty patch would be one patch to whoever knows patches by their digest."""
    federation = Federation(
        modules={"layer": ModuleSpec(out_features=9, in_features=12)},
        rank=3, scaling=2.0, weights=(1.0,), seed=0,
        clients=(ClientSpec(partition_id=0, rank=3, scaling=2.0),),
    )  # fmt: skip
    before = federation.start(RULE)
    (one,) = federation.updates(RULE, before)
    updates = [one] if alone else [one, replace(one, partition_id=1)]
    after, diagnostics = RULE.aggregate(before, updates)
    assert after.base == ()
    assert diagnostics is not None
    assert diagnostics.gap < 1e-12


@pytest.mark.parametrize("kind", ["conv1d", "linear"])
def test_a_real_model_gets_the_mean_update_on_layers_that_are_not_square(kind: str, tmp_path: Path) -> None:
    """Base + adapter of the moved model == base + mean of the clients' products, weights and logits.

    GPT-2's layers are Conv1D (in, out); the tiny BERT's ``intermediate.dense`` is nn.Linear (out, in).
    """
    name, targets = (
        ("tiny", "intermediate.dense") if kind == "linear" else (str(save_tiny_gpt2(tmp_path)), "")
    )
    model, expected = adapted(name, targets=targets), adapted(name, targets=targets)
    assert all(m.out_features != m.in_features for m in model.modules.values())
    state = RULE.init(
        Template(modules=model.modules, rank=3, scaling=2.0, adapters=random_adapters(model.modules, 3)), 0
    )
    weights = (1.0, 2.0, 5.0)
    for server_round in (1, 2):
        drawn = [random_adapters(model.modules, 3, seed=10 * server_round + k) for k in range(3)]
        updates = [
            ClientUpdate(partition_id=k, adapters=a, head={}, weight=w)
            for k, (a, w) in enumerate(zip(drawn, weights, strict=True))
        ]
        before = state
        state, _ = RULE.aggregate(state, updates)
    moved = {n: sum(w / 8 * a[n].delta() for a, w in zip(drawn, weights, strict=True)) for n in model.modules}
    model.base.move(state.base)
    model.load(state.adapters, {})
    expected.base.move(before.base)
    for module, change in moved.items():
        layer = expected.module.get_submodule(module)
        weight = getattr(layer, "base_layer", layer).weight
        weight.data = weight.data + (change.T if kind == "conv1d" else change)
    zero = {n: LoraFactors(f.A, torch.zeros_like(f.B), 2.0) for n, f in state.adapters.items()}
    expected.load(zero, {})
    batch = token_batch(vocabulary=200)
    torch.testing.assert_close(
        logits(model.module, batch), logits(expected.module, batch), rtol=1e-4, atol=1e-5
    )
    for module, factors in state.adapters.items():
        patches = sum(numpy(patch.products[module].dense()) for patch in state.base[len(before.base) :])
        assert relative(numpy(factors.delta()) + patches, numpy(moved[module])) < 1e-6
