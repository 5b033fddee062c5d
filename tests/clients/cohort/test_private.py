"""DP-SGD in a cohort: the one-by-one mechanism for each client, on its own examples and noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from clients.training.batched import Member, private
from clients.training.batched import members as drawn_by
from clients.training.batched.train import Cohort
from clients.training.dp_mechanism import Mechanism
from fedlora.models import AdaptedModel
from tests.clients.cohort.samples import assert_same, mechanism, member, privately, task, together

HOWS: list[dict[str, Any]] = [
    {},
    {"grad_sample_mode": "ghost"},
    {"clipping": "per-layer"},
    {"max_physical_batch_size": 2},
]
every_how = pytest.mark.parametrize("how", HOWS, ids=lambda how: "-".join(map(str, how.values())) or "hooks")
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}


def unequal(network: AdaptedModel) -> list[Member]:
    return [
        member(network, 0, steps=2, size=9),
        member(network, 1, rank=2, size=7, steps=4),
        member(network, 2, rank=1, size=20, steps=6),
    ]


@every_how
@pytest.mark.parametrize("config", [{}, {**SGD, "momentum": 0.9, "proximal_mu": 0.5}], ids=["adamw", "sgd"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_client_comes_out_as_if_alone(
    dropout: float, config: dict[str, Any], how: dict[str, Any], network: AdaptedModel
) -> None:
    assert_same(network, privately(unequal(network), **how), task(dropout=dropout, **config))


def test_cores(network: AdaptedModel) -> None:
    members = [member(network, k, rank=2 + k, cored=1) for k in range(2)]
    assert_same(network, privately(members), task())


def test_large_clipping_norms_clip_nothing(network: AdaptedModel) -> None:
    """So that a sum that is clipped where it must not be cannot hide behind noise."""
    quiet = [
        replace(m, mechanism=mechanism(noise_multiplier=0.0, max_grad_norm=c))
        for m, c in zip(unequal(network), (1e6, 1e6, 1e6), strict=True)
    ]
    assert_same(network, quiet, task(**SGD))


def steps_on(network: AdaptedModel, members: list[Member], drawn: list[Any]) -> dict[str, torch.Tensor]:
    cohort = Cohort(network, members, task())
    mechanisms: list[Mechanism] = [m.mechanism for m in members if m.mechanism is not None]
    with cohort.route_laid():
        return cohort.private(drawn, mechanisms)


@pytest.mark.parametrize("empty", [(0, 1), (1,), (0,)])
def test_an_empty_draw_is_noise_alone(empty: tuple[int, ...], network: AdaptedModel) -> None:
    members = privately([member(network, k, rank=16) for k in range(2)])
    drawn = [m.indices[:0] if k in empty else m.indices[:2] for k, m in enumerate(members)]
    released = steps_on(network, members, drawn)
    nobody = steps_on(network, members, [m.indices[:0] for m in members])
    for place, one in enumerate(members):
        found = torch.cat([t[place].flatten() for t in released.values()])
        noise = torch.cat([t[place].flatten() for t in nobody.values()])
        assert one.mechanism is not None
        assert float(noise.std()) == pytest.approx(one.mechanism.noise_std, rel=0.03)
        assert torch.equal(found, noise) == (place in empty)


@pytest.mark.parametrize("clip", [0.01, 0.1, 1.0])
def test_no_example_counts_for_more_than_the_bound(clip: float, network: AdaptedModel) -> None:
    """Over all tensors that its client trains, and none that it does not."""
    names = list(network.modules)
    quiet = mechanism(noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1)
    members = [
        replace(member(network, k), mechanism=quiet, modules=frozenset(names[: 1 + k])) for k in range(2)
    ]
    for example in range(3):
        released = steps_on(network, members, [m.indices[example : example + 1] for m in members])
        sizes = [
            float(torch.cat([t[k].flatten() for t in released.values()]).norm()) for k in range(len(members))
        ]
        assert max(sizes) <= clip * (1 + 1e-6)
        if clip == 0.01:
            assert min(sizes) == pytest.approx(clip, rel=1e-3)


def test_secure_noise_and_draws_are_the_systems(
    network: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = privately(unequal(network), secure=True)
    one, other = (together(network, members, task())[0] for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert not any(torch.equal(a[name], b[name]) for name in a)
    asked: list[int] = []
    monkeypatch.setattr(
        private, "system_normal", lambda shape: asked.append(shape.numel()) or torch.zeros(shape)
    )
    monkeypatch.setattr(drawn_by, "private_streams", lambda seed, *, secure: (7, np.random.default_rng(0)))
    one, other = (together(network, members, task())[0] for _ in range(2))
    assert asked
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_clients_have_noise_of_their_own(network: AdaptedModel) -> None:
    members = privately([member(network, k) for k in range(2)])
    released = steps_on(network, members, [m.indices[:0] for m in members])
    for noise in released.values():
        assert not torch.isclose(noise[0], noise[1]).any()


def test_noise_falls_on_exactly_what_is_trained(network: AdaptedModel) -> None:
    """Not on the filling of a smaller rank, either."""
    members = privately([member(network, 0, rank=4), member(network, 1, rank=2)])
    released = steps_on(network, members, [m.indices[:0] for m in members])
    for name in network.modules:
        assert not released[f"{name}.A"][1, 2:].any()
        assert not released[f"{name}.B"][1, :, 2:].any()
        assert (released[f"{name}.A"][1, :2] != 0).all()
        assert (released[f"{name}.A"][0] != 0).all()
