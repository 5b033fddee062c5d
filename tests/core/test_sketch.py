"""Sketches of products: what clients add up, what it tells of the sum, and how much it misses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.factors import AdapterSet, LoraFactors, Tensors
from fedlora.core.seeding import torch_stream
from fedlora.core.sketch import SPARE, Sketch


def factors(out_features: int, in_features: int, rank: int, seed: int) -> LoraFactors:
    g = torch_stream(seed, "factors")
    A, B = (torch.randn(*shape, generator=g, dtype=torch.float64)
            for shape in ((rank, in_features), (out_features, rank)))  # fmt: skip
    return LoraFactors(A, B, 1 / rank)


def added(sketch: Sketch, clients: Sequence[AdapterSet]) -> Tensors:
    total = sketch.start(clients[0])
    for one in clients:
        own = sketch.sketches(one)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in total.items()}
        total = {name: tensor + own[name] for name, tensor in total.items()}
    return total


@given(
    out_features=st.integers(1, 90), in_features=st.integers(1, 90), seed=st.integers(0, 99),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)  # fmt: skip
def test_a_wide_sketch_is_the_sum(out_features: int, in_features: int, seed: int, ranks: list[int]) -> None:
    """For any shapes and ranks; what is added up is never more than the layer."""
    clients = [{"q": factors(out_features, in_features, rank, seed + i)} for i, rank in enumerate(ranks)]
    sketch = Sketch(sum(ranks) + SPARE, seed)
    total = added(sketch, clients)
    assert sum(tensor.numel() for tensor in total.values()) <= out_features * in_features
    found, lost = sketch.products(clients[0], total, sum(ranks))
    expected = torch.stack([one["q"].delta() for one in clients]).sum(dim=0)
    assert float((found["q"].delta() - expected).norm() / expected.norm()) < 1e-5
    assert lost < 1e-6
    assert found["q"].rank <= min(sum(ranks), out_features, in_features)


@pytest.mark.parametrize("size", [6, 12])
def test_what_a_narrow_sketch_misses_is_measured(size: int) -> None:
    """Within a fifth over twelve layers, whatever was drawn; a wider one misses less."""
    misses = []
    for width in (size, 2 * size):
        clients = [{str(n): factors(150, 130, 4, 100 * n + i) for n in range(12)} for i in range(8)]
        sketch = Sketch(width, 7)
        found, lost = sketch.products(clients[0], added(sketch, clients), 32)
        missed = kept = 0.0
        for name in found:
            exact = torch.stack([one[name].delta() for one in clients]).sum(dim=0)
            missed += float((found[name].delta() - exact).square().sum())
            kept += float(found[name].delta().square().sum())
        share = (missed / (missed + kept)) ** 0.5
        assert lost == pytest.approx(share, rel=0.2)
        misses.append(missed)
    assert misses[1] < misses[0]


def test_layers_and_seeds_draw_apart_and_clients_alike() -> None:
    one = factors(80, 90, 2, 0)
    sketches = Sketch(6, 1).sketches({"a": one, "b": one})
    again, other = Sketch(6, 1).sketches({"a": one}), Sketch(6, 2).sketches({"a": one})
    for name, tensor in again.items():
        assert torch.equal(tensor, sketches[name])
        assert not torch.allclose(tensor, other[name])
        assert not torch.allclose(tensor, sketches[name.replace("/a/", "/b/")])


def test_a_sketch_without_end_is_the_layer() -> None:
    assert Sketch(10**15, 1).shapes(30, 20) == {"whole": (30, 20)}
