"""Adapters cut for serving, and what vLLM's documented limits make of them."""

from __future__ import annotations

import math

import pytest
import torch

from fedlora.core.factors import LoraFactors, as_product
from fedlora.models.serving import cut, vllm_says

OUT, IN = 12, 9


def drawn(rank: int, scaling: float = 2.0, seed: int = 0) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, IN, generator=g), torch.randn(OUT, rank, generator=g), scaling)


def test_the_cut_is_the_nearest_and_says_what_it_lost() -> None:
    given = {"q": drawn(6), "v": drawn(7, 0.5, 1)}
    found = cut(given, 3)
    gone = total = 0.0
    for name, factors in given.items():
        dense = factors.delta().double()
        U, S, Vh = torch.linalg.svd(dense)
        nearest = (U[:, :3] * S[:3]) @ Vh[:3]
        assert found.adapters[name].rank == 3
        torch.testing.assert_close(found.adapters[name].delta().double(), nearest, rtol=1e-4, atol=1e-4)
        gone, total = gone + float((dense - nearest).square().sum()), total + float(dense.square().sum())
    assert found.energy_lost == pytest.approx(gone / total, rel=1e-4)
    assert 0 < found.energy_lost < 1


def test_what_is_not_above_the_bound_stays_bit_for_bit() -> None:
    given = {"q": drawn(3), "v": drawn(2, 0.5, 1)}
    for bound in (0, 3, 50):
        assert cut(given, bound).adapters is given
        assert cut(given, bound).energy_lost == 0.0


def test_layers_below_the_bound_are_the_same_products_at_one_scaling() -> None:
    """Engines take one scaling for all layers."""
    given = {"q": drawn(2, 0.5), "v": drawn(6, 3.0, 1)}
    found = cut(given, 4)
    assert {f.scaling for f in found.adapters.values()} == {1.0}
    torch.testing.assert_close(found.adapters["q"].delta(), given["q"].delta())
    assert found.adapters["q"].rank == 2


def test_directions_that_are_not_there_are_not_written() -> None:
    doubled = LoraFactors(torch.ones(5, IN), torch.ones(OUT, 5), 1.0)
    found = cut({"q": doubled}, 4)
    assert found.energy_lost == pytest.approx(0.0, abs=1e-10)
    torch.testing.assert_close(found.adapters["q"].delta(), doubled.delta())
    nothing = LoraFactors(torch.zeros(5, IN), torch.zeros(OUT, 5), 1.0)
    assert cut({"q": nothing}, 4).adapters["q"].rank == 1
    assert not math.isnan(cut({"q": nothing}, 4).energy_lost)


@pytest.mark.parametrize(
    ("rank", "head", "words"),
    [
        (16, [], "vLLM serves it"),
        (17, [], "vLLM serves it with --max-lora-rank 32"),
        (300, [], "vLLM serves it with --max-lora-rank 320"),
        (513, [], "vLLM serves rank 512 at most, this adapter has 513"),
        (4, ["classifier.weight"], "vLLM serves no adapter with a trained head (modules_to_save)"),
    ],
)
def test_vllms_limits(rank: int, head: list[str], words: str) -> None:
    adapters = {"q": LoraFactors(torch.zeros(rank, 600), torch.zeros(600, rank), 1.0)}
    assert vllm_says(adapters, head) == words


def test_vllm_takes_one_scaling() -> None:
    assert "one scaling" in vllm_says({"q": drawn(2), "v": drawn(2, 1.0)}, [])
    assert as_product(drawn(2)).rank_bound == 2
