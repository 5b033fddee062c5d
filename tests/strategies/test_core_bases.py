"""Fed-SB on bases of the weight or of cosines, and with a core in blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.core.adapters import as_lora
from fedlora.errors import ConfigError
from strategies.rules.core_bases import ldu
from strategies.rules.fed_sb import FedSBRule
from tests import oracles
from tests.strategies.federations import assert_same_bits, numpy, oracle_layer, relative
from tests.strategies.test_fed_sb import EMPTY, FEDERATION, RANK, assert_orthonormal, rounds, weights


@pytest.mark.parametrize("core", ["dense", "diagonal"])
@pytest.mark.parametrize("subspace", ["principal", "ldu", "cosine"])
def test_bases_of_the_weight_or_of_cosines_are_frozen_and_start_at_the_base(subspace: str, core: str) -> None:
    rule = FedSBRule(subspace=subspace, core=core)
    first, *_, last = rounds(rule, 3)
    assert rule.base_weights == (subspace != "cosine")
    for name, factors in last.adapters.items():
        start = first.adapters[name]
        assert start.R is not None
        assert not start.R.any()
        assert start.R.shape == ((RANK, RANK) if core == "dense" else (RANK, 1, 1))
        assert_same_bits({"A": factors.A, "B": factors.B}, {"A": start.A, "B": start.B})
        assert factors.R is not None
        assert float(factors.R.norm()) > 1
        if subspace != "ldu":
            assert_orthonormal(factors)


def test_principal_bases_are_the_leading_singular_vectors() -> None:
    """``B^T W A^T = diag(S_r)``, by numpy."""
    state = rounds(FedSBRule(subspace="principal"), 0)[0]
    for name, W in weights().items():
        f = state.adapters[name]
        S = np.linalg.svd(numpy(W), compute_uv=False)[:RANK]
        assert np.abs(numpy(f.B).T @ numpy(W) @ numpy(f.A).T - np.diag(S)).max() < 1e-5


@pytest.mark.parametrize("wide", [False, True])
def test_ldu_bases_make_the_weight_with_a_diagonal_between_them(wide: bool) -> None:
    """At full rank, by least squares for the diagonal; both are triangular up to the order of the rows."""
    W = FEDERATION.normal((6, 4), "square").float()
    W = W.T if wide else W
    B, A = ldu(W, 4)
    terms = np.stack([np.outer(b, a).ravel() for b, a in zip(numpy(B).T, numpy(A), strict=True)], axis=1)
    d, *_ = np.linalg.lstsq(terms, numpy(W).ravel(), rcond=None)
    assert relative((terms @ d).reshape(numpy(W).shape), numpy(W)) < 1e-5
    assert np.abs(np.tril(numpy(A), -1)).max() < 1e-7
    assert np.allclose(np.linalg.norm(numpy(B), axis=0), 1)
    assert np.allclose(np.linalg.norm(numpy(A), axis=1), 1)
    assert not ldu(torch.zeros(6, 4), 4)[1].any()


def test_cosines_are_those_of_the_transform_at_drawn_frequencies() -> None:
    f = rounds(FedSBRule(subspace="cosine"), 0)[0].adapters["a"]
    for rows in (numpy(f.B).T, numpy(f.A)):
        n = np.arange(rows.shape[1])
        basis = np.cos(np.pi * n[:, None] * (n + 0.5) / len(n))
        basis /= np.linalg.norm(basis, axis=1, keepdims=True)
        places = np.abs(rows @ basis.T)
        assert np.abs(np.sort(places, axis=1)[:, -1] - 1).max() < 1e-6
        assert len(set(places.argmax(axis=1))) == RANK
    other = FedSBRule(subspace="cosine").init(EMPTY, FEDERATION.seed + 1).adapters["a"]
    assert not torch.equal(f.A.float(), as_lora(other).A)


def test_heads_are_blocks_on_the_diagonal_and_average_as_a_dense_core_does() -> None:
    """Rank 4 in two heads: 8 numbers; the mean of the products is the product of the means."""
    clients = tuple(replace(c, rank=4) for c in FEDERATION.clients)
    federation, rule = replace(FEDERATION, rank=4, clients=clients), FedSBRule(heads=2)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, _ = rule.aggregate(before, updates)
    for name, f in after.adapters.items():
        assert f.R is not None
        assert f.R.shape == (2, 2, 2)
        wanted = oracles.mean_update(oracle_layer(before, updates, name)[1])
        assert relative(numpy(f.delta()), wanted) < 1e-12
        assert np.linalg.norm(wanted) > 0.1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"core": "sparse"}, r"core = 'sparse': accepted are dense, diagonal"),
        ({"heads": 0}, r"heads = 0: must be >= 1"),
        ({"core": "diagonal", "heads": 2}, r"heads = 2: a diagonal core has one for each direction"),
        (
            {"subspace": "ldu", "init_a": "pissa"},
            r"init-a = 'pissa': fed-sb with subspace = 'ldu' has its own A",
        ),
    ],
)
def test_options_that_fit_together_in_no_way_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FedSBRule(**options)


def test_what_a_start_lacks_is_said() -> None:
    with pytest.raises(ConfigError, match=r"heads = 2: must divide lora\.rank = 3"):
        FedSBRule(heads=2).init(EMPTY, 1)
    with pytest.raises(ConfigError, match=r"subspace = 'principal': needs the base weights"):
        FedSBRule(subspace="principal").init(EMPTY, 1)
