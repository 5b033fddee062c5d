"""Canaries: their directions, their coins, and how they enter a private step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clients.training import dp_sgd
from fedlora.audit.canaries import ClientCanaries, Design
from fedlora.config import TrainConfig
from tests.clients.measures import same_bits, tensors, values
from tests.clients.samples import PAD, everyone, examples, loaded, train_by_dp_sgd

DATA = examples()
ALL = everyone(DATA)
CLIP = 0.5


def design(factors: int = 20, head: int = 10) -> Design:
    return Design(counts={"factors": factors, "head": head}, clients=[0, 3], seed=1, max_grad_norm=CLIP)


def train(canaries: ClientCanaries | None, *, noise: float = 0.0, **how: Any) -> Any:
    return train_by_dp_sgd(
        loaded(),
        DATA,
        ALL,
        PAD,
        TrainConfig(optimizer="sgd", learning_rate=1.0, batch_size=24),
        local_steps=1,
        noise_multiplier=noise,
        max_grad_norm=CLIP,
        seed=1,
        canaries=canaries,
        **how,
    )


def test_directions_of_all_clients_are_orthonormal_where_there_is_room() -> None:
    both = torch.cat([design().directions("factors", p, 50) for p in (0, 3)])
    torch.testing.assert_close(both @ both.T, torch.eye(40), rtol=0, atol=1e-5)
    crowded = design().directions("factors", 3, 30)
    torch.testing.assert_close(crowded @ crowded.T, torch.eye(20), rtol=0, atol=1e-5)


def test_coins_are_fair_and_everybodys_own() -> None:
    many = design(factors=4000)
    one, other = many.coins("factors", 0), many.coins("factors", 3)
    assert one.mean() == pytest.approx(0.5, abs=0.03)
    assert (one == other).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("most", [0, 5])
def test_a_member_moves_the_model_by_the_clipping_norm_along_its_direction(most: int) -> None:
    """At a sample rate of 1; the others, and other tensors, do not move."""
    canaries = ClientCanaries(design(), 0, frozenset("AB"))
    moved = tensors(train(canaries, max_physical_batch_size=most))
    plain = tensors(train(None))
    start = values(loaded())
    coins = {group: canaries.design.coins(group, 0) for group in ("factors", "head")}
    assert {n for names in canaries.names.values() for n in names} == set(start)
    for group, names in canaries.names.items():
        change = torch.cat([(plain[n] - moved[n]).flatten() for n in names])
        found = canaries.design.directions(group, 0, len(change)) @ change
        torch.testing.assert_close(
            found * 24 / CLIP, torch.from_numpy(coins[group]).float(), rtol=0, atol=1e-3
        )
        assert float(change.norm()) * 24 / CLIP == pytest.approx(coins[group].sum() ** 0.5, rel=1e-3)


def test_canaries_push_along_nothing_that_is_not_shipped() -> None:
    canaries = ClientCanaries(design(), 0, frozenset("B"))
    moved, plain = tensors(train(canaries)), tensors(train(None))
    for name in moved:
        assert torch.equal(moved[name], plain[name]) == name.endswith(".A")


def test_canaries_are_drawn_as_examples_are_at_the_same_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, float]] = []
    real = dp_sgd.poisson_batches

    def recorded(indices: np.ndarray, rate: float, steps: int, rng: Any) -> Any:
        seen.append((indices, rate))
        return real(indices, rate, steps, rng)

    monkeypatch.setattr(dp_sgd, "poisson_batches", recorded)
    canaries = ClientCanaries(design(), 3, frozenset("AB"))
    train(canaries)
    (indices, rate), members = seen[0], canaries.members()
    assert rate == 1.0
    assert indices.tolist() == [*range(24), *(24 + members)]
    wanted = np.concatenate([canaries.design.coins(g, 3) for g in ("factors", "head")])
    assert members.tolist() == np.flatnonzero(wanted).tolist()


def test_without_a_member_nothing_changes() -> None:
    class Nobody(Design):
        def coins(self, group: str, partition: int) -> Any:
            return np.zeros(self.counts[group], dtype=bool)

    nobody = Nobody(counts={"factors": 4, "head": 4}, clients=[0], seed=1, max_grad_norm=CLIP)
    assert same_bits(train(ClientCanaries(nobody, 0, frozenset("AB")), noise=1.0), train(None, noise=1.0))
