"""FedMomentum: FlexLoRA's adapter, and in the base what FlexLoRA loses."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from strategies.rules.fedmomentum import FedMomentumRule
from tests import oracles
from tests.strategies.federations import (
    Federation,
    federations,
    numpy,
    oracle_layer,
    relative,
)

RULE = FedMomentumRule()


@given(federation=federations())
def test_the_patch_is_the_tail_of_the_spectrum_and_no_larger(federation: Federation) -> None:
    """As many columns as singular values beyond r; no patch at all where the adapter holds everything."""
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    after, _ = RULE.aggregate(before, updates)
    moved = after.base[-1].products if after.base else {}
    for name in before.adapters:
        T = oracles.mean_update(oracle_layer(before, updates, name)[1])
        U, S, Vt = np.linalg.svd(T, full_matrices=False)
        r, rank = federation.rank, int(np.linalg.matrix_rank(T))
        assert (name in moved) == (rank > r)
        if name in moved:
            assert moved[name].rank_bound == rank - r
            assert relative(numpy(moved[name].dense()), (U[:, r:] * S[r:]) @ Vt[r:]) < 1e-8


@given(federation=federations(min_clients=2))
def test_adapter_and_patch_share_no_direction(federation: Federation) -> None:
    """Row and column spaces at right angles: what goes into the base is what the adapter cannot say."""
    before = federation.start(RULE)
    after, _ = RULE.aggregate(before, federation.updates(RULE, before))
    for patch in after.base:
        for name, product in patch.products.items():
            A, B = after.adapters[name].A, after.adapters[name].B
            size = float(product.left.norm() * product.right.norm())
            assert float((product.right @ A.T).abs().max()) < 1e-9 * (1 + size)
            assert float((product.left.T @ B).abs().max()) < 1e-9 * (1 + size) * (1 + float(B.norm()))
