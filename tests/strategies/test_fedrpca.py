"""FedRPCA: a planted split is found, and what is done with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.errors import ConfigError
from strategies.registry import make_rule
from strategies.rules.fedrpca import FedRPCARule, common
from tests.strategies.federations import effective, numpy, one_layer, relative


def planted(clients: int = 60, numbers: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """One direction that all share, and for each client 5 % of the numbers of its own, ten times as large."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(numbers, 1, generator=g) @ (1 + torch.rand(1, clients, generator=g))
    own = torch.where(torch.rand(numbers, clients, generator=g) < 0.05, 10.0, 0.0)
    return shared.double(), (own * torch.randn(numbers, clients, generator=g).sign()).double()


def test_a_shared_direction_and_sparse_changes_are_told_apart() -> None:
    shared, own = planted()
    assert float((common(shared + own) - shared).norm() / shared.norm()) < 1e-5


def test_what_is_found_is_the_least_of_the_two_norms() -> None:
    """No other split near by has a smaller ``||L||_* + lam ||S||_1``."""
    M = sum(planted(6, 40))
    assert isinstance(M, torch.Tensor)
    lam = max(M.shape) ** -0.5

    def cost(L: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(L, "nuc") + lam * (M - L).abs().sum())

    L = common(M)
    g = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            other = torch.randn(M.shape, generator=g, dtype=M.dtype) * size
            assert cost(L) < cost(L + other) + 1e-6
    assert cost(L) < min(cost(M), cost(torch.zeros_like(M)))


def test_beta_1_is_fedavg_and_a_larger_one_counts_what_is_a_client_s_own() -> None:
    federation = one_layer(clients=5)
    states = {}
    for name, rule in (("fedavg", make_rule("fedavg")), *((b, FedRPCARule(beta=b)) for b in (1.0, 2.0, 3.0))):
        before = federation.start(rule)
        states[name] = rule.aggregate(before, federation.updates(rule, before))[0].adapters["layer"]
    assert relative(numpy(states[1.0].delta()), numpy(states["fedavg"].delta())) < 1e-12
    steps = [numpy(states[b + 1.0].A - states[b].A) for b in (1.0, 2.0)]
    assert np.linalg.norm(steps[0]) > 1e-3
    assert relative(steps[1], steps[0]) < 1e-9


def test_who_changes_nothing_leaves_the_model_as_it_is() -> None:
    federation, rule = one_layer(clients=3), FedRPCARule()
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    rested = [
        type(u)(partition_id=u.partition_id, adapters=before.adapters, head=u.head, weight=1.0)
        for u in updates
    ]
    after, _ = rule.aggregate(before, rested)
    assert np.array_equal(effective(after)["layer"], effective(before)["layer"])


@pytest.mark.parametrize("beta", [-0.5, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.options beta = .*: must be finite and >= 0"):
        make_rule("fedrpca", {"beta": beta})
