"""FedRPCA: a planted split is found, and what is done with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.errors import ConfigError
from strategies.registry import make_rule
from strategies.rules import fedrpca
from strategies.rules.fedrpca import FedRPCARule, common
from tests.oracles.robust_pca import pursuit
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


def cost(M: torch.Tensor, L: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(L, "nuc") + max(M.shape) ** -0.5 * (M - L).abs().sum())


def test_what_is_found_is_the_least_of_the_two_norms() -> None:
    """No other split near by has a smaller ``||L||_* + lam ||S||_1``."""
    M = sum(planted(6, 40))
    assert isinstance(M, torch.Tensor)
    L = common(M)
    g = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            other = torch.randn(M.shape, generator=g, dtype=M.dtype) * size
            assert cost(M, L) < cost(M, L + other) + 1e-6
    assert cost(M, L) < min(cost(M, M), cost(M, torch.zeros_like(M)))


def tall(numbers: int, clients: int, shared: float) -> torch.Tensor:
    """What each client changes at random, and `shared` times what all change alike but for a tenth."""
    g = torch.Generator().manual_seed(0)
    own = torch.randn(numbers, clients, generator=g)
    return (own + shared * torch.randn(numbers, 1, generator=g) @ (1 + own[:1] / 10)).double()


@pytest.mark.parametrize(("numbers", "shared"), [(20_000, 0.0), (4_000, 1.0), (4_000, 5.0)])
def test_no_split_of_a_tall_matrix_costs_less(numbers: int, shared: float) -> None:
    """By duality: ``<M, Y>`` is below every split's cost where ``||Y||_2 <= 1`` and ``|Y| <= lam``, any Y."""
    M = tall(numbers, 8, shared)
    Y = torch.from_numpy(pursuit(M.numpy(), tolerance=1e-7)[1])
    Y /= max(1.0, float(torch.linalg.matrix_norm(Y, 2)), float(Y.abs().max()) * max(M.shape) ** 0.5)
    least, found = float((M * Y).sum()), cost(M, common(M))
    assert least <= found <= least * (1 + 1e-5)


@pytest.mark.parametrize("shared", [0.0, 5.0])
def test_rows_at_once_decide_rounding_alone(shared: float, monkeypatch: pytest.MonkeyPatch) -> None:
    M = tall(500, 6, shared)
    whole = common(M)
    monkeypatch.setattr(fedrpca, "ROWS", 7)
    assert relative(numpy(common(M)), numpy(whole)) < 1e-12


def test_any_shape_is_split() -> None:
    """One client, one number, more clients than numbers, columns that are the same, nothing at all."""
    g = torch.Generator().manual_seed(0)
    shapes = ((30, 1), (1, 1), (1, 6), (5, 40), (30, 4))
    drawn = [torch.randn(shape, generator=g).double() for shape in shapes]
    same = drawn[0].expand(30, 5)
    for M in (*drawn, same, 1e-30 * drawn[-1], 1e30 * drawn[-1]):
        assert relative(numpy(common(M)), pursuit(M.numpy())[0]) < 1e-9
    assert not common(torch.zeros(3, 2).double()).any()


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
