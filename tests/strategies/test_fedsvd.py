"""FedSVD: what the refactorisation guarantees of one layer (its relation to FFA is in the next file)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.state import State
from fedlora.errors import ConfigError
from strategies.registry import make_rule
from strategies.rules.fedsvd import FedSVDRule, refactored
from tests import oracles
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    federations,
    named_tensors,
    numpy,
    oracle_layer,
    relative,
)

RULE = FedSVDRule()


def low_rank(federation: Federation) -> Federation:
    """The same layers with a rank that their inputs can hold: r orthonormal rows need r <= in."""
    room = min(m.in_features for m in federation.modules.values())
    return replace(federation, rank=min(federation.rank, room)).suited(RULE.facts)


def rounds(rule: FedSVDRule, federation: Federation, number: int) -> list[State]:
    states = [federation.start(rule)]
    for _ in range(number):
        states.append(rule.aggregate(states[-1], federation.updates(rule, states[-1]))[0])
    return states


def projector(A: oracles.Array) -> oracles.Array:
    """The orthogonal projector on the row space of a full-rank A."""
    return np.asarray(np.linalg.pinv(A) @ A)


@given(federation=federations())
def test_rows_of_a_are_orthonormal_and_columns_of_b_orthogonal_and_descending(federation: Federation) -> None:
    federation = low_rank(federation)
    for state in rounds(RULE, federation, 2)[1:]:
        for factors in state.adapters.values():
            A, B = numpy(factors.A), numpy(factors.B)
            gram = B.T @ B
            assert np.abs(A @ A.T - np.eye(federation.rank)).max() < 1e-10
            assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-10 * np.abs(gram).max()
            assert np.all(np.diff(np.diag(gram)) <= 1e-10 * np.abs(gram).max())


@given(federation=federations())
def test_the_product_is_the_average_whatever_the_shape(federation: Federation) -> None:
    """Also where r exceeds out or in, and a full basis does not exist."""
    federation = federation.suited(RULE.facts)
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    after, _ = RULE.aggregate(before, updates)
    plain, _ = make_rule("ffa").aggregate(before, updates)
    for name, factors in after.adapters.items():
        assert relative(numpy(factors.delta()), numpy(plain.adapters[name].delta())) < 1e-12


@given(federation=federations())
def test_a_never_leaves_the_row_space_of_its_start(federation: Federation) -> None:
    states = rounds(RULE, low_rank(federation), 3)
    for name, factors in states[0].adapters.items():
        first = projector(numpy(factors.A))
        for state in states[1:]:
            assert np.abs(projector(numpy(state.adapters[name].A)) - first).max() < 1e-7


@given(federation=federations(), rank_of_b=st.integers(0, 2))
def test_nor_where_the_mean_of_b_lacks_rank(federation: Federation, rank_of_b: int) -> None:
    """B = 0 after a round in which nobody learnt, or one row of B tied to the others by a softmax."""
    federation = low_rank(federation)
    start = federation.start(RULE)
    adapters = {}
    for name, f in start.adapters.items():
        left = federation.normal((f.out_features, rank_of_b), "left", name)
        adapters[name] = replace(f, B=left @ federation.normal((rank_of_b, f.rank), "right", name))
    for name, factors in adapters.items():
        again = refactored(factors)
        A, first = numpy(again.A), projector(numpy(factors.A))
        assert np.abs(A @ A.T - np.eye(federation.rank)).max() < 1e-10, name
        assert np.abs(projector(A) - first).max() < 1e-7, name
        assert relative(numpy(again.delta()), numpy(factors.delta())) < 1e-12, name


@given(federation=federations())
def test_the_thin_svd_is_the_papers_dense_one_up_to_signs(federation: Federation) -> None:
    federation = low_rank(federation)
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    after, _ = RULE.aggregate(before, updates)
    for name, factors in after.adapters.items():
        dense = oracles.fedsvd(*oracle_layer(before, updates, name), 1).adapter
        B, A = numpy(factors.B), numpy(factors.A)
        sizes = np.linalg.norm(dense.B, axis=0)
        for j, size in enumerate(sizes):
            alone = min((abs(size - other) for i, other in enumerate(sizes) if i != j), default=size)
            if min(alone, size) < 1e-3 * sizes[0]:
                continue
            sign = np.sign(A[j] @ dense.A[j])
            assert np.abs(sign * A[j] - dense.A[j]).max() < 1e-8
            assert np.abs(sign * B[:, j] - dense.B[:, j]).max() < 1e-8 * sizes[0]


@given(federation=federations(), period=st.integers(1, 4))
def test_it_refactors_every_period_rounds_and_is_ffa_in_between(federation: Federation, period: int) -> None:
    rule, ffa = FedSVDRule(period=period), make_rule("ffa")
    federation = low_rank(federation)
    state = federation.start(rule)
    for server_round in range(1, 6):
        updates = federation.updates(rule, state)
        plain, _ = ffa.aggregate(state, updates)
        state, _ = rule.aggregate(state, updates)
        if server_round % period:
            assert_same_bits(named_tensors(state), named_tensors(plain))
        else:
            for factors in state.adapters.values():
                gram = numpy(factors.B.T @ factors.B)
                assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-10 * np.abs(gram).max()


@given(federation=federations())
def test_the_signs_are_fixed(federation: Federation) -> None:
    """In each row of A the entry of largest magnitude is positive, so that B A alone decides the bits."""
    for factors in rounds(RULE, low_rank(federation), 1)[1].adapters.values():
        peaks = factors.A.gather(1, factors.A.abs().argmax(dim=1, keepdim=True))
        assert (peaks > 0).all()


@pytest.mark.parametrize("period", [0, -1])
def test_an_impossible_period_is_refused(period: int) -> None:
    with pytest.raises(ConfigError, match=r"^strategy.options period = -?\d: must be >= 1$"):
        FedSVDRule(period=period)
