"""Under SGD, FedSVD trains the same model as FFA-LoRA from an orthonormal A; under Adam it does not.

The refactorisation rotates A inside its row space and B with it; the gradient of B rotates along, SGD
(clipped or not) and averaging commute with the rotation, an element-wise optimiser does not. Both rules
are played on a small nonlinear model by three unlike clients, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.core.factors import LoraFactors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State
from strategies.registry import make_rule
from strategies.rule import Rule
from tests import oracles
from tests.strategies.federations import Federation, effective, numpy, relative

MODULES = {
    "hidden": ModuleSpec(out_features=9, in_features=7),
    "output": ModuleSpec(out_features=4, in_features=9),
}
ROUNDS, LOCAL_STEPS, EXAMPLES = 6, 4, 24
RANK = 3
FEDERATION = Federation(
    modules=MODULES,
    rank=RANK,
    scaling=2.0,
    clients=tuple(ClientSpec(partition_id=i, rank=RANK, scaling=2.0) for i in range(3)),
    weights=(1.0, 4.0, 2.0),
    seed=21,
)

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2)


def sgd_with_momentum_and_decay(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


@dataclass(frozen=True)
class Client:
    """Its own inputs and its own labels' law."""

    x: Tensor
    y: Tensor

    @staticmethod
    def drawn(partition_id: int) -> Client:
        stream = torch_stream(FEDERATION.seed, "data", partition_id)
        x = torch.randn(EXAMPLES, 7, generator=stream, dtype=torch.float64) + partition_id
        teacher = torch.randn(7, 4, generator=stream, dtype=torch.float64)
        return Client(x, (x @ teacher).argmax(dim=1))

    def trained(
        self, adapters: dict[str, LoraFactors], optimizer: Optimizer, max_norm: float | None
    ) -> dict[str, LoraFactors]:
        """Full-batch steps on B alone, through tanh and a cross-entropy."""
        Bs = {name: f.B.clone().requires_grad_() for name, f in adapters.items()}
        step = optimizer(Bs.values())
        for _ in range(LOCAL_STEPS):
            step.zero_grad()
            hidden = torch.tanh(self.x @ weight("hidden", adapters, Bs).T)
            logits = hidden @ weight("output", adapters, Bs).T
            torch.nn.functional.cross_entropy(logits, self.y).backward()  # type: ignore[no-untyped-call]
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(Bs.values(), max_norm)
            step.step()
        return {name: replace(f, B=Bs[name].detach()) for name, f in adapters.items()}


def weight(name: str, adapters: dict[str, LoraFactors], Bs: dict[str, Tensor]) -> Tensor:
    spec, f = MODULES[name], adapters[name]
    W_0 = FEDERATION.normal((spec.out_features, spec.in_features), "W_0", name) / spec.in_features**0.5
    effective_weight: Tensor = W_0 + f.scaling * Bs[name] @ f.A
    return effective_weight


def orthonormal_start(rank: int = RANK) -> dict[str, LoraFactors]:
    """B = 0 and rows of A orthonormal to float64 (the library's own draw is float32)."""
    start = {}
    for name, spec in MODULES.items():
        Q, _ = torch.linalg.qr(FEDERATION.normal((spec.in_features, rank), "A", name))
        start[name] = LoraFactors(Q.T, torch.zeros(spec.out_features, rank, dtype=Q.dtype), 2.0)
    return start


def trajectory(
    rule: Rule, start: dict[str, LoraFactors], optimizer: Optimizer, max_norm: float | None = None
) -> list[dict[str, oracles.Array]]:
    """``s B A`` of both layers after each round; client 1 is away in round 2."""
    state: State = rule.init(replace(FEDERATION.template(), adapters=start), FEDERATION.seed)
    path = []
    for server_round in range(1, ROUNDS + 1):
        updates = []
        for spec, n in zip(FEDERATION.clients, FEDERATION.weights, strict=True):
            if server_round == 2 and spec.partition_id == 1:
                continue
            rank = state.adapters["hidden"].rank
            given = rule.broadcast(state, replace(spec, rank=rank))
            trained = Client.drawn(spec.partition_id).trained(given.adapters, optimizer, max_norm)
            updates.append(ClientUpdate(partition_id=spec.partition_id, adapters=trained, head={}, weight=n))
        state, _ = rule.aggregate(state, updates)
        path.append(effective(state))
    return path


def apart(one: list[dict[str, oracles.Array]], other: list[dict[str, oracles.Array]]) -> float:
    """The largest relative distance over rounds and layers."""
    return max(relative(x[name], y[name]) for x, y in zip(one, other, strict=True) for name in y)


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize(
    ("optimizer", "max_norm"),
    [(sgd, None), (sgd, 0.05), (sgd_with_momentum_and_decay, None)],
    ids=["sgd", "clipped sgd", "momentum and decay"],
)
def test_under_sgd_both_train_the_same_model(
    optimizer: Optimizer, max_norm: float | None, period: int
) -> None:
    fedsvd = trajectory(make_rule("fedsvd", {"period": period}), orthonormal_start(), optimizer, max_norm)
    ffa = trajectory(make_rule("ffa"), orthonormal_start(), optimizer, max_norm)
    assert apart(fedsvd, ffa) < 1e-9
    for layer in MODULES:
        assert float(np.linalg.norm(fedsvd[-1][layer] - fedsvd[0][layer])) > 0.1


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_so_they_do_at_ranks_that_the_output_layer_cannot_fill(rank: int) -> None:
    """Four outputs: the softmax leaves B A at rank three, so the SVD alone does not determine A."""
    fedsvd = trajectory(make_rule("fedsvd"), orthonormal_start(rank), sgd)
    ffa = trajectory(make_rule("ffa"), orthonormal_start(rank), sgd)
    assert apart(fedsvd, ffa) < 1e-9


def test_under_adam_they_differ() -> None:
    fedsvd = trajectory(make_rule("fedsvd"), orthonormal_start(), adam)
    ffa = trajectory(make_rule("ffa"), orthonormal_start(), adam)
    assert apart(fedsvd[:1], ffa[:1]) < 1e-9
    assert apart(fedsvd, ffa) > 0.05


def test_from_another_start_they_differ_after_the_first_round() -> None:
    """Not orthonormal: the refactorisation changes the lengths of A's rows, so the step of B too."""
    longer = {name: replace(f, A=1.7 * f.A) for name, f in orthonormal_start().items()}
    fedsvd = trajectory(make_rule("fedsvd"), longer, sgd)
    ffa = trajectory(make_rule("ffa"), longer, sgd)
    assert apart(fedsvd[:1], ffa[:1]) < 1e-9
    assert apart(fedsvd, ffa) > 0.05


def test_the_models_are_really_trained() -> None:
    """The comparison is not between two models that stand still."""
    before = orthonormal_start()
    after = trajectory(make_rule("ffa"), before, sgd)[-1]
    assert all(float(np.linalg.norm(delta)) > 0.1 for delta in after.values())
    assert all(not numpy(f.B).any() for f in before.values())
