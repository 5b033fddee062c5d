"""Last bits and overflows: neither tells whether somebody is in a sum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from opacus.optimizers import get_optimizer_class

from clients.training.opacus_parts import SystemNoise
from fedlora.core.factors import LoraFactors
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.privacy.entropy import GRID, on_grid, system_normal
from strategies.client_dp import ClientDP

SIZE, STD = (64, 96), 0.3


def update(partition: int, start: Broadcast, generator: torch.Generator) -> ClientUpdate:
    moved = {
        name: LoraFactors(
            A=f.A + 0.02 * torch.randn(f.A.shape, generator=generator), B=f.B.clone(), scaling=f.scaling
        )
        for name, f in start.adapters.items()
    }
    return ClientUpdate(partition_id=partition, adapters=moved, head={}, weight=1.0)


def reachable(released: torch.Tensor, start: torch.Tensor, width: float) -> torch.Tensor:
    """Which coordinates are float32(start + a multiple of the width), whoever is in the sum."""
    steps = ((released.double() - start.double()) / width).round()
    return (start.double() + steps * width).float() == released


@pytest.mark.parametrize("seed", [None, 3])
def test_every_released_coordinate_is_possible_without_any_given_client(seed: int | None) -> None:
    """The attack: a coordinate that no noise could have made without client 2 names client 2."""
    generator = torch.Generator().manual_seed(0)
    first = LoraFactors(A=torch.randn(SIZE, generator=generator) / 8, B=torch.zeros(8, SIZE[0]), scaling=1.0)
    start = Broadcast(
        adapters={"a": first},
        trained=frozenset("A"),
        uploaded=frozenset("A"),
        modules=frozenset("a"),
        head={},
    )
    updates = [update(partition, start, generator) for partition in (1, 2, 3)]
    mechanism = ClientDP(clipping_norm=1.0, noise_multiplier=STD, seed=seed)
    (private,) = mechanism.privatise(updates, dict.fromkeys((1, 2, 3), start), 4, 1)
    width = 2.0 ** math.floor(math.log2(STD * GRID)) / 4
    assert reachable(private.adapters["a"].tensors()["A"], first.A, width).all()
    # what the attack finds where noise is rounded to float32 and added to the clients' sum
    naive = sum((u.adapters["a"].tensors()["A"] - first.A for u in updates), start=torch.zeros(SIZE))
    naive = first.A + (naive + (STD * system_normal(torch.Size(SIZE))).float()) / 4
    assert not reachable(naive, first.A, width).all()


def test_noise_of_the_system_lies_on_a_grid_around_any_sum() -> None:
    kind = get_optimizer_class("flat", distributed=False, grad_sample_mode="hooks")
    secure = type("Secure", (SystemNoise, kind), {})
    parameter = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = secure(
        torch.optim.SGD([parameter], lr=1.0), noise_multiplier=STD, max_grad_norm=1.0, expected_batch_size=1
    )
    width = 2.0 ** math.floor(math.log2(STD * GRID))
    for total in (torch.zeros(SIZE), torch.full(SIZE, 0.1), torch.randn(SIZE)):
        parameter.summed_grad = total  # type: ignore[attr-defined]
        optimizer.add_noise()
        assert parameter.grad is not None
        steps = parameter.grad.double() / width
        assert torch.equal(steps, steps.round())
        assert (parameter.grad - total).std() == pytest.approx(STD, rel=0.05)


def test_the_grid_is_fine_against_the_noise_and_coarse_against_rounding() -> None:
    values = on_grid(system_normal(torch.Size([200_000])) * STD, STD).numpy()
    assert values.std() == pytest.approx(STD, rel=0.01)
    assert len(np.unique(values)) > 500
    assert 2.0**-9 <= 2.0 ** math.floor(math.log2(STD * GRID)) / STD <= 2.0**-8
