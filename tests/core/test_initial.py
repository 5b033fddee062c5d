"""Starting values of A and B."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.init_drawn import DRAWN, fresh_adapters, initial_a
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ModuleSpec
from fedlora.errors import ConfigError

MODULES = {f"layer.{i}": ModuleSpec(out_features=5 + i, in_features=7) for i in range(4)}


@pytest.mark.parametrize(("rank", "in_features"), [(1, 5), (4, 64), (16, 100)])
def test_kaiming_is_torchs_kaiming_uniform_with_a_sqrt_5(rank: int, in_features: int) -> None:
    """PEFT's default for A, number by number from the same generator."""
    ours = initial_a("kaiming", rank, in_features, torch_stream(3, "a"))
    theirs = torch.empty(rank, in_features)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=torch_stream(3, "a"))
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=1e-6 / math.sqrt(in_features))


def test_kaiming_fills_its_interval() -> None:
    """Uniform on (-1/sqrt(in), 1/sqrt(in)): bound, mean, variance."""
    A = initial_a("kaiming", 200, 400, torch_stream(0, "a")) * math.sqrt(400)
    assert 0.999 < float(A.abs().max()) <= 1.0
    assert abs(float(A.mean())) < 0.01
    assert abs(float(A.var()) - 1 / 3) < 0.01


@given(rank=st.integers(1, 8), more=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_orthonormal_rows(rank: int, more: int, seed: int) -> None:
    A = initial_a("orthonormal", rank, rank + more, torch_stream(seed, "a"))
    assert A.shape == (rank, rank + more)
    assert A.dtype == torch.float32
    assert A.is_contiguous()
    assert float((A.double() @ A.double().T - torch.eye(rank)).abs().max()) < 1e-6


def test_orthonormal_rows_point_everywhere() -> None:
    """Haar-distributed: each entry of many draws has mean 0, so no sign is preferred, and variance 1/in."""
    draws = torch.stack([initial_a("orthonormal", 2, 5, torch_stream(s, "a")) for s in range(2000)])
    assert float(draws.mean(dim=0).abs().max()) < 0.05
    assert float((draws.var(dim=0) - 1 / 5).abs().max()) < 0.03


@pytest.mark.parametrize("init_a", DRAWN)
def test_every_module_has_its_own_stream(init_a: str) -> None:
    """Equal shapes, other values; and no value depends on which other modules there are."""
    everything = fresh_adapters(MODULES, 2, 0.5, 9, init_a)
    backwards = fresh_adapters(dict(reversed(MODULES.items())), 2, 0.5, 9, init_a)
    for name, spec in MODULES.items():
        alone = fresh_adapters({name: spec}, 2, 0.5, 9, init_a)[name]
        for factors in (everything[name], backwards[name]):
            assert torch.equal(factors.A, alone.A)
            assert not factors.B.any()
            assert (factors.A.shape, factors.B.shape) == ((2, 7), (spec.out_features, 2))
            assert factors.scaling == 0.5
    drawn = [factors.A for factors in everything.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[i + 1 :])
    assert list(everything) == list(MODULES)


@pytest.mark.parametrize("init_a", DRAWN)
def test_the_seed_decides(init_a: str) -> None:
    one, again, other = (fresh_adapters(MODULES, 2, 1.0, s, init_a)["layer.0"].A for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        initial_a("pissa", 2, 3, torch_stream(0, "a"))
    assert (
        str(error.value)
        == "strategy.init-a = 'pissa' (did you mean miss?): accepted are kaiming, orthonormal, miss"
    )
