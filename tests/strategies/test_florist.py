"""FLoRIST: the fewest directions with enough energy, the rest as FLoRA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec
from fedlora.errors import ConfigError
from strategies.registry import make_rule
from strategies.rules.florist import FLoRISTRule, directions
from tests import oracles
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    effective,
    federations,
    oracle_layer,
    relative,
)

THRESHOLDS = st.sampled_from([1e-6, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0])


@given(federation=federations(min_clients=2), threshold=THRESHOLDS)
def test_the_patch_has_the_fewest_directions_with_enough_energy(
    federation: Federation, threshold: float
) -> None:
    """One fewer does not do; what is lost is what the diagnostics say."""
    rule = FLoRISTRule(threshold=threshold)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, diagnostics = rule.aggregate(before, updates)
    assert diagnostics is not None
    kept = energy = 0.0
    for name in before.adapters:
        T = oracles.mean_update(oracle_layer(before, updates, name)[1])
        S = np.linalg.svd(T, compute_uv=False)
        share = np.cumsum(S**2) / max(float(np.sum(S**2)), 1e-300)
        moved = len(after.base) > len(before.base) and name in after.base[-1].products
        p = after.base[-1].products[name].rank_bound if moved else 0
        if S[0] < 1e-12:
            assert p == 0
            continue
        assert share[p - 1] >= threshold - 1e-12
        assert p == 1 or share[p - 2] < threshold
        kept, energy = kept + float(np.sum(S[:p] ** 2)), energy + float(np.sum(S**2))
    if energy:
        assert diagnostics.energy_lost == pytest.approx(1 - kept / energy, rel=1e-6, abs=1e-12)
        assert diagnostics.energy_lost <= 1 - threshold + 1e-9


@given(federation=federations(min_clients=2))
def test_with_a_threshold_of_one_it_is_flora_in_fewer_numbers(federation: Federation) -> None:
    rule, flora = FLoRISTRule(threshold=1.0), make_rule("flora")
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    (after, diagnostics), (other, _) = rule.aggregate(before, updates), flora.aggregate(before, updates)
    assert diagnostics is not None
    assert diagnostics.gap < 1e-6
    for name, delta in effective(after).items():
        assert relative(delta, effective(other)[name]) < 1e-10
    for mine, theirs in zip(after.base[-1:], other.base[-1:], strict=True):
        assert mine.nbytes <= theirs.nbytes


@given(federation=federations())
def test_clients_start_afresh_as_under_flora(federation: Federation) -> None:
    rule, flora = FLoRISTRule(), make_rule("flora")
    state, _ = rule.aggregate(federation.start(rule), federation.updates(rule, federation.start(rule)))
    for client in federation.clients:
        mine, theirs = rule.broadcast(state, client), flora.broadcast(state, client)
        assert mine.fresh_seed == theirs.fresh_seed is not None
        for name, factors in mine.adapters.items():
            expected = theirs.adapters[name]
            assert_same_bits({"A": factors.A, "B": factors.B}, {"A": expected.A, "B": expected.B})


def test_directions_count_whole_and_none_of_nothing() -> None:
    """Energies 16, 4, 4, 1: cumulated 0.64, 0.80, 0.96, 1."""
    S = torch.tensor([4.0, 2.0, 2.0, 1.0])
    counts = {1e-9: 1, 0.64: 1, 0.65: 2, 0.79: 2, 0.81: 3, 0.96: 3, 0.97: 4, 1.0: 4}
    assert {threshold: directions(S, threshold) for threshold in counts} == counts
    assert directions(S[:0], 0.9) == 0


def test_a_round_of_zeros_adds_no_patch() -> None:
    """Twice the same empty patch would be one patch to whoever knows patches by their digest."""
    rule = FLoRISTRule()
    spec = ClientSpec(partition_id=0, rank=2, scaling=1.0)
    federation = Federation(
        modules={"layer": ModuleSpec(out_features=5, in_features=6)},
        rank=2,
        scaling=1.0,
        clients=(spec,),
        weights=(1.0,),
        seed=0,
    )
    state = federation.start(rule)
    given = rule.broadcast(state, spec)
    still = ClientUpdate(partition_id=0, adapters=given.adapters, head={}, weight=1.0)
    after, diagnostics = rule.aggregate(state, [still])
    assert after.base == state.base
    assert diagnostics is not None
    assert (diagnostics.gap, diagnostics.energy_lost) == (0.0, 0.0)


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_an_impossible_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"^strategy.options threshold = \S+: must be in \(0, 1\]$"):
        FLoRISTRule(threshold=threshold)
