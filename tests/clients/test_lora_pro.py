"""LoRA-Pro against its paper's equations, computed densely in float64; and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.evaluation import evaluate
from clients.training.optimizers.registry import make_optimizer
from clients.training.train import train_local
from fedlora.config import TrainConfig
from fedlora.core.state import Trainable
from tests.clients.samples import PAD, everyone, examples, loaded

OUT, IN, RANK, S, LR = 7, 9, 3, 2.5, 0.05
TARGET = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
ROOT = torch.randn(IN, IN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
Q = torch.tensor([[2.0, 0.3, -1.0], [0.0, 0.05, 4.0], [1.0, 0.0, 0.5]], dtype=torch.float64)
TURN = torch.linalg.qr(Q)[0]


def factors(split: Tensor | None = None, *, zero_b: bool = False) -> dict[str, Tensor]:
    """A, B and a core, and for a split Q the factors Q^-1 A and B Q of the same product."""
    g = torch.Generator().manual_seed(1)
    A, B, R = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((RANK, IN), (OUT, RANK), (RANK, RANK))
    )
    B = 0 * B if zero_b else B
    if split is None:
        return {"A": A, "B": B, "R": R}
    inverse = torch.linalg.inv(split)
    return {"A": inverse @ A, "B": B @ split, "R": inverse @ R @ split}


def gradient(product: Tensor) -> Tensor:
    """G, of a quadratic loss of the whole weight."""
    return (product - TARGET) @ ROOT @ ROOT.T


def trained_by(
    start: dict[str, Tensor], letters: str = "AB", steps: int = 1, **config: Any
) -> dict[str, Tensor]:
    """The factors after steps of the optimiser; where R is not among the letters there is no core."""
    held = {x: nn.Parameter(t.clone()) for x, t in start.items() if x != "R" or "R" in letters}
    trained = Trainable(
        factors={f"q.{x}": held[x] for x in letters},
        head={},
        frozen={f"q.{x}": p for x, p in held.items() if x not in letters},
        scaling={"q": S},
    )
    settings = TrainConfig(**{"optimizer": "lora-pro", "learning_rate": LR, **config})
    optimizer = make_optimizer(trained, settings)
    for _ in range(steps):
        optimizer.zero_grad()
        G = gradient(product(held)).detach()
        (product(held) * G).sum().backward()
        optimizer.step()
    return {x: p.detach() for x, p in held.items()}


def product(held: dict[str, Any]) -> Tensor:
    return S * held["B"] @ (held["R"] @ held["A"] if "R" in held else held["A"])


def directions(start: dict[str, Tensor], letters: str = "AB", **config: Any) -> dict[str, Tensor]:
    """What each factor moved against."""
    after = trained_by(start, letters, **config)
    return {x: (start[x] - after[x]) / LR for x in after}


def projector(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


@pytest.mark.parametrize("x", ["nearest", "even"])
def test_the_product_moves_by_the_projected_full_gradient(x: str) -> None:
    start = factors()
    found = directions(start, optimizer_options=f'{{"x": "{x}"}}')
    A, B = start["A"], start["B"]
    G, P_B, P_A = gradient(S * B @ A), projector(B), projector(A.T)
    wanted = P_B @ G + G @ P_A - P_B @ G @ P_A
    torch.testing.assert_close(S * (B @ found["A"] + found["B"] @ A), wanted, rtol=1e-10, atol=1e-10)


def test_x_is_the_papers() -> None:
    """It solves the Sylvester equation, and no other X comes nearer to the plain gradients."""
    start = factors()
    A, B = start["A"], start["B"]
    found = directions(start)
    G = gradient(S * B @ A)
    g_a, g_b = S * B.T @ G, S * G @ A.T
    H = torch.linalg.inv(B.T @ B)
    X = (found["A"] - H @ g_a / S**2) @ torch.linalg.pinv(A)
    torch.testing.assert_close(B.T @ B @ X + X @ A @ A.T, -H @ g_a @ A.T / S**2, rtol=1e-8, atol=1e-8)

    def far(change: Tensor) -> float:
        return float(
            (found["A"] + change @ A - g_a).norm() ** 2 + (found["B"] - B @ change - g_b).norm() ** 2
        )

    least = far(torch.zeros(RANK, RANK, dtype=torch.float64))
    g = torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-1, 1.0):
        assert far(size * torch.randn(RANK, RANK, generator=g, dtype=torch.float64)) > least


@pytest.mark.parametrize("split", [Q, TURN, 1e3 * torch.eye(RANK, dtype=torch.float64)])
@pytest.mark.parametrize("x", ["nearest", "even"])
def test_the_step_of_the_product_does_not_depend_on_its_split(x: str, split: Tensor) -> None:
    moves = []
    for start in (factors(), factors(split)):
        found = directions(start, optimizer_options=f'{{"x": "{x}"}}')
        moves.append(S * (start["B"] @ found["A"] + found["B"] @ start["A"]))
    torch.testing.assert_close(*moves, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("x", "split"), [("even", Q), ("even", TURN), ("nearest", TURN)])
def test_nor_do_many_steps_with_momentum_and_weight_decay(x: str, split: Tensor) -> None:
    config = {"momentum": 0.9, "weight_decay": 0.1, "optimizer_options": f'{{"x": "{x}"}}'}
    ends = [product(trained_by(start, steps=8, **config)) for start in (factors(), factors(split))]
    torch.testing.assert_close(*(end[:] for end in ends), rtol=1e-8, atol=1e-8)
    assert (ends[0] - product({k: v for k, v in factors().items() if k != "R"})).norm() > 0.1


def test_even_shares_the_common_part_out_by_halves() -> None:
    start = factors()
    A, B = start["A"], start["B"]
    found = directions(start, optimizer_options='{"x": "even"}')
    of_a, of_b = B @ found["A"] @ projector(A.T), projector(B) @ found["B"] @ A
    torch.testing.assert_close(of_a, of_b, rtol=1e-8, atol=1e-8)
    assert of_a.norm() > 0.1


def test_plain_gradients_do_depend_on_it() -> None:
    """So that the laws above cannot hold by themselves."""
    moves = []
    for start in (factors(), factors(Q)):
        A, B = start["A"], start["B"]
        G = gradient(S * B @ A)
        moves.append(S * (B @ (S * B.T @ G) + (S * G @ A.T) @ A))
    assert (moves[0] - moves[1]).norm() > 0.1 * moves[0].norm()


@pytest.mark.parametrize("letters", ["A", "B", "R"])
def test_one_factor_alone_comes_as_near_as_it_can(letters: str) -> None:
    for split in (None, Q):
        start = factors(split)
        found = directions(start, letters)
        A, B = start["A"], start["B"]
        if letters == "R":
            G = gradient(product(start))
            moved, wanted = S * B @ found["R"] @ A, projector(B) @ G @ projector(A.T)
        else:
            G = gradient(S * B @ A)
            moved = S * (B @ found["A"] if letters == "A" else found["B"] @ A)
            wanted = projector(B) @ G if letters == "A" else G @ projector(A.T)
        torch.testing.assert_close(moved, wanted, rtol=1e-8, atol=1e-8)


def test_the_first_step_from_zero_moves_b_alone() -> None:
    start = factors(zero_b=True)
    found = directions(start)
    assert not found["A"].any()
    G = gradient(torch.zeros(OUT, IN, dtype=torch.float64))
    torch.testing.assert_close(S * found["B"] @ start["A"], G @ projector(start["A"].T), rtol=1e-8, atol=1e-8)


def test_it_learns() -> None:
    """At a rate of full fine-tuning by SGD, at which plain SGD on A and B does not."""
    data, after = examples(60), {}
    for name, rate in (("lora-pro", 30.0), ("sgd", 1.0)):
        model = loaded(4, train_head=False)
        config = TrainConfig(optimizer=name, learning_rate=rate, momentum=0.9)
        train_local(model, data, everyone(data), PAD, config, local_steps=60, seed=0)
        after[name] = evaluate(model, data, everyone(data), PAD)
    assert after["lora-pro"].accuracy > 0.9 > after["sgd"].accuracy
