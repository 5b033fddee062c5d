"""The variant that adapts A: exact, orthonormal, and free to leave the first row space."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given

from fedlora.core.decompositions import outside
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientSpec, ModuleSpec, State
from fedlora.errors import ConfigError
from strategies.registry import make_rule
from strategies.rule import Rule
from tests.strategies.federations import Federation, effective, federations, numpy, relative

RULE = make_rule("fedsvd-renew")
FEDERATION = Federation(
    modules={"layer": ModuleSpec(out_features=20, in_features=24)},
    rank=4,
    scaling=2.0,
    clients=tuple(ClientSpec(partition_id=i, rank=4, scaling=2.0) for i in range(3)),
    weights=(1.0, 2.0, 3.0),
    seed=7,
)


def after(rule: Rule, rounds: int, federation: Federation = FEDERATION) -> list[State]:
    states = [federation.start(rule)]
    for _ in range(rounds):
        states.append(rule.aggregate(states[-1], federation.updates(rule, states[-1]))[0])
    return states


def test_the_update_leaves_the_first_row_space_and_fedsvd_never_does() -> None:
    first = numpy(FEDERATION.start(RULE).adapters["layer"].A)
    inside = np.linalg.qr(first.T)[0]
    for name, leaves in (("fedsvd-renew", True), ("fedsvd", False)):
        delta = effective(after(make_rule(name), 6)[-1])["layer"]
        outside_it = np.linalg.norm(delta - delta @ inside @ inside.T) / np.linalg.norm(delta)
        assert (outside_it > 0.1) == leaves
        assert (np.linalg.matrix_rank(delta) > FEDERATION.rank) == leaves


def test_fresh_rows_are_orthonormal_outside_the_old_ones_and_start_at_zero() -> None:
    states = after(RULE, 3)
    for before, state in pairwise(states):
        A, B = (numpy(t) for t in (state.adapters["layer"].A, state.adapters["layer"].B))
        np.testing.assert_allclose(A @ A.T, np.eye(4), atol=1e-12)
        assert not B[:, -1:].any()
        assert np.abs(A[-1:] @ numpy(before.adapters["layer"].A).T).max() < 1e-12


def test_it_is_the_weakest_direction_that_moves_into_the_base() -> None:
    start, end = after(RULE, 1)
    averaged = make_rule("ffa").aggregate(start, FEDERATION.updates(RULE, start))[0]
    sigma = np.linalg.svd(effective(averaged)["layer"], compute_uv=False)
    patch = numpy(end.base[-1].products["layer"].dense())
    np.testing.assert_allclose(np.linalg.svd(patch, compute_uv=False)[:2], [sigma[3], 0], atol=1e-9)


def test_the_fresh_rows_come_from_the_runs_seed_and_round() -> None:
    one, two, again = (
        numpy(after(RULE, 2, f)[-1].adapters["layer"].A)[-1] for f in (FEDERATION, FEDERATION, FEDERATION)
    )
    assert (one == two).all()
    assert (one == again).all()
    rows = torch.eye(24, dtype=torch.float64)[:4]
    drawn = [outside(rows, 2, torch_stream(0, "renew", server_round, "x")) for server_round in (1, 2)]
    assert not torch.equal(*drawn)


@given(federation=federations())
def test_a_whole_renewal_moves_everything_and_starts_afresh(federation: Federation) -> None:
    rule = make_rule("fedsvd-renew", {"renew": 1.0})
    federation = federation.suited(rule.facts)
    start, end = after(rule, 1, federation)
    for name, factors in end.adapters.items():
        assert not factors.B.any()
        assert relative(effective(end)[name], numpy(end.base[-1].products[name].dense())) < 1e-12
    assert start.base == ()


def test_between_renewals_it_is_ffa() -> None:
    rule = make_rule("fedsvd-renew", {"period": 3})
    states, plain = after(rule, 3), after(make_rule("ffa"), 2)
    assert relative(effective(states[2])["layer"], effective(plain[2])["layer"]) < 1e-12
    assert [len(s.base) for s in states] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"renew": 0.0}, "renew = 0.0"), ({"renew": 1.5}, "renew = 1.5"), ({"period": 0}, "period = 0")],
)
def test_impossible_options_are_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy.options {named}: must be"):
        make_rule("fedsvd-renew", options)
