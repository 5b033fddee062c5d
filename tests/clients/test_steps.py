"""ScaledGD and AdaBelief against their papers' equations; steps by the size of a product's move."""

from __future__ import annotations

import json
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
from tests.clients.test_lora_pro import IN, LR, OUT, RANK, Q, S, factors, gradient, product, trained_by


def moved(
    start: dict[str, Tensor], letters: str = "AB", name: str = "scaled", **options: Any
) -> dict[str, Tensor]:
    after = trained_by(start, letters, optimizer=name, optimizer_options=json.dumps(options))
    return {x: (start[x] - after[x]) / LR for x in after}


def test_scaled_gd_is_the_papers_but_for_the_scaling() -> None:
    start = factors()
    A, B = start["A"], start["B"]
    G = gradient(S * B @ A)
    found = moved(start, damping=0.0)
    torch.testing.assert_close(found["A"], torch.linalg.inv(B.T @ B) @ (S * B.T @ G) / S**2)
    torch.testing.assert_close(found["B"], (S * G @ A.T) @ torch.linalg.inv(A @ A.T) / S**2)


def test_its_damping_is_a_share_of_the_largest_eigenvalue() -> None:
    start = factors()
    A, B = start["A"], start["B"]
    G, gram = gradient(S * B @ A), A @ A.T
    most = torch.linalg.eigvalsh(gram)[-1]
    wanted = (S * G @ A.T) @ torch.linalg.inv(gram + 0.3 * most * torch.eye(RANK).to(gram)) / S**2
    torch.testing.assert_close(moved(start, damping=0.3)["B"], wanted)


@pytest.mark.parametrize("name", ["scaled", "lora-pro"])
@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_the_step_of_the_product_does_not_depend_on_its_split(name: str, beta2: float) -> None:
    moves = []
    options = {"damping": 0.0} if name == "scaled" else {}
    for start in (factors(), factors(Q)):
        found = moved(start, name=name, beta2=beta2, **options)
        moves.append(S * (start["B"] @ found["A"] + found["B"] @ start["A"]))
    torch.testing.assert_close(*moves, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["scaled", "lora-pro"])
def test_many_sized_steps_do_not_either(name: str) -> None:
    more = {"damping": 0.0} if name == "scaled" else {"x": "even"}
    how = {"momentum": 0.9, "optimizer": name, "optimizer_options": json.dumps({"beta2": 0.9, **more})}
    ends = [product(trained_by(start, steps=8, **how)) for start in (factors(), factors(Q))]
    torch.testing.assert_close(*(end[:] for end in ends), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "letters"), [("lora-pro", "AB"), ("lora-pro", "A"), ("scaled", "R"), ("scaled", "AB")]
)
def test_the_first_sized_step_moves_the_weight_by_one_rate(name: str, letters: str) -> None:
    start = factors()
    found = moved(start, letters, name, beta2=0.99)
    now = {x: t for x, t in start.items() if x != "R" or "R" in letters}
    changes = [product({**now, x: found[x]}) for x in letters]
    whole = sum(changes[1:], changes[0])
    assert whole.norm() / (OUT * IN) ** 0.5 == pytest.approx(1.0)


def test_the_head_is_divided_as_adams_is() -> None:
    """Without momentum it is RMSprop with Adam's correction: AdamW at beta_1 = 0."""
    ends = []
    for name, options in (("lora-pro", {"beta2": 0.9}), ("adamw", {"betas": [0.0, 0.9]})):
        head = nn.Parameter(torch.ones(4, dtype=torch.float64))
        how = TrainConfig(optimizer=name, optimizer_options=json.dumps(options), learning_rate=0.1)
        optimizer = make_optimizer(Trainable(factors={}, head={"h": head}), how)
        for step in range(5):
            head.grad = torch.arange(4.0, dtype=torch.float64) - step
            optimizer.step()
        ends.append(head.detach())
    torch.testing.assert_close(*ends)


def test_adabelief_is_algorithm_2() -> None:
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(6, generator=g, dtype=torch.float64))
    how = TrainConfig(
        optimizer="adabelief", learning_rate=0.1, weight_decay=0.2,
        optimizer_options='{"betas": [0.8, 0.95], "eps": 1e-4}',
    )  # fmt: skip
    optimizer = make_optimizer(Trainable(factors={}, head={"h": p}), how)
    theta, m, s = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 7):
        p.grad = torch.randn(6, generator=g, dtype=torch.float64)
        grad = p.grad.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * grad
        s = 0.95 * s + 0.05 * (grad - m) ** 2 + 1e-4
        theta = (1 - 0.1 * 0.2) * theta
        theta = theta - 0.1 * (m / (1 - 0.8**t)) / ((s / (1 - 0.95**t)).sqrt() + 1e-4)
        torch.testing.assert_close(p.detach(), theta)


@pytest.mark.parametrize("name", ["scaled", "lora-pro"])
def test_sized_steps_learn_at_adams_rates(name: str) -> None:
    """At which, unsized, nothing is learned."""
    data, after = examples(60), {}
    for beta2 in (0.99, 0.0):
        model = loaded(4, train_head=False)
        how = TrainConfig(
            optimizer=name, learning_rate=5e-3, momentum=0.9, optimizer_options=json.dumps({"beta2": beta2})
        )
        train_local(model, data, everyone(data), PAD, how, local_steps=60, seed=0)
        after[beta2] = evaluate(model, data, everyone(data), PAD).accuracy
    assert after[0.99] > 0.85 > 0.6 > after[0.0]
