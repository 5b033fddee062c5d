"""An adapter with a core: one delta, however it is written, sent, stored or resized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.core.factors import LoraFactors, after_core, as_product, before_core, resize, stack
from fedlora.core.peft_keys import from_peft, key_of, to_peft
from fedlora.core.state import ServerState, State
from fedlora.errors import FactorShapeError
from fedlora.server.directory import RunDirectory
from fedlora.wire import frozen_tensors, moving_tensors
from fedlora.wire.instruction import Broadcast

OUT, IN, RANK = 6, 5, 3


def cored(seed: int = 0, scaling: float = 2.0) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    shapes = {"A": (RANK, IN), "B": (OUT, RANK), "R": (RANK, RANK)}
    values = {x: torch.randn(*s, generator=g, dtype=torch.float64) for x, s in shapes.items()}
    return LoraFactors(scaling=scaling, **values)


def dense(f: LoraFactors) -> torch.Tensor:
    assert f.R is not None
    return f.scaling * f.B @ f.R @ f.A


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_every_way_to_the_delta_has_the_core_in_it() -> None:
    f, plain = cored(0), replace(cored(1), R=None)
    assert close(f.delta(), dense(f))
    assert close(f.folded().delta(), dense(f))
    assert f.folded().R is None
    assert close(as_product(f).dense(), dense(f))
    both = stack([(0.25, f), (0.75, plain)])
    assert close(both.dense(), 0.25 * dense(f) + 0.75 * plain.delta())


@pytest.mark.parametrize("heads", [3, 2])
def test_a_core_in_blocks_is_the_dense_one_with_zeros_elsewhere(heads: int) -> None:
    """Three of one number, and two of two by two."""
    size = {3: 1, 2: 2}[heads]
    g = torch.Generator().manual_seed(heads)
    drawn = [
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((heads * size, IN), (OUT, heads * size))
    ]
    R = torch.randn(heads, size, size, generator=g, dtype=torch.float64)
    f = LoraFactors(*drawn, 2.0, R)
    same = replace(f, R=torch.block_diag(*R))
    assert close(f.delta(), dense(same))
    assert close(as_product(f).dense(), dense(same))
    assert close(after_core(R, f.A), same.R @ f.A)
    assert close(before_core(f.B, R), f.B @ same.R)
    stacked = torch.stack([f.A, 2 * f.A])
    assert close(after_core(torch.stack([R, R + 1]), stacked)[1], torch.block_diag(*(R + 1)) @ (2 * f.A))
    longer, shorter = resize(f, f.rank + size, 0.5), resize(f, f.rank - size, 2.0)
    assert close(longer.delta(), f.delta())
    assert longer.R is not None
    assert longer.R.shape[0] == heads + 1
    assert close(shorter.folded().A, same.R[: f.rank - size, : f.rank - size] @ f.A[: f.rank - size])


def test_without_a_core_nothing_is_copied() -> None:
    plain = replace(cored(), R=None)
    assert plain.folded() is plain
    assert list(plain.tensors()) == ["A", "B"]
    assert list(cored().tensors()) == ["A", "B", "R"]


@pytest.mark.parametrize(
    "shape",
    [(RANK, RANK + 1), (RANK + 1, RANK + 1), (RANK,), (RANK, 1, 2), (2, 2, 2), (1, RANK, RANK), (0, 0, 0)],
)
def test_a_core_of_another_rank_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FactorShapeError, match=r"core of rank 3"):
        replace(cored(), R=torch.ones(shape))


@pytest.mark.parametrize("rank", [RANK, RANK + 2])
def test_a_larger_rank_and_another_scaling_keep_the_delta_and_the_outer_factors(rank: int) -> None:
    """The core absorbs the scaling, so that everybody has the same bits of A and B."""
    f = cored()
    other = resize(f, rank, 0.3)
    assert (other.rank, other.scaling) == (rank, 0.3)
    assert close(other.delta(), dense(f))
    assert torch.equal(other.A[:RANK], f.A)
    assert torch.equal(other.B[:, :RANK], f.B)


def test_a_smaller_rank_keeps_the_leading_block() -> None:
    f = cored()
    assert f.R is not None
    smaller = resize(f, 2, f.scaling)
    assert close(smaller.delta(), f.scaling * f.B[:, :2] @ f.R[:2, :2] @ f.A[:2])


def test_the_core_has_a_key_of_its_own_and_comes_back() -> None:
    adapters = {"x.query": cored(0), "x.value": cored(1)}
    tensors = to_peft(adapters, {"head": torch.ones(1)})
    assert key_of("x.query", "R") == "base_model.model.x.query.lora_R.weight"
    assert key_of("x.query", "R") in tensors
    parts = from_peft(tensors)
    assert set(parts.head) == {"head"}
    for name, factors in parts.adapters(2.0).items():
        for x, tensor in adapters[name].tensors().items():
            assert torch.equal(factors.tensors()[x], tensor)
    assert set(to_peft(adapters, {}, {"R"}, {"x.query"})) == {key_of("x.query", "R")}


@pytest.mark.parametrize("factor", ["A", "B", "R"])
def test_a_module_that_lacks_a_factor_of_the_others_is_refused(factor: str) -> None:
    tensors = to_peft({"x": cored(0), "y": cored(1)}, {})
    del tensors[key_of("y", factor)]
    with pytest.raises(FactorShapeError, match="module y has only some of its factors"):
        from_peft(tensors).adapters(1.0)


def test_factors_in_place_of_others_leave_the_rest() -> None:
    mine = from_peft({key_of("x", "R"): torch.eye(RANK)})
    adapters = {"x": cored(0), "y": cored(1)}
    after = mine.over(adapters)
    assert torch.equal(after["x"].tensors()["R"], torch.eye(RANK))
    assert after["x"].A is adapters["x"].A
    assert all(after["y"].tensors()[x] is t for x, t in adapters["y"].tensors().items())


def test_every_factor_of_an_order_is_either_frozen_or_moving() -> None:
    adapters = {"x": cored()}
    for trained in ({"R"}, {"A"}, {"B", "R"}, {"A", "B"}):
        sent = Broadcast(
            adapters=adapters,
            trained=frozenset(trained),
            uploaded=frozenset(trained),
            modules=frozenset(adapters),
            head={},
        )
        assert set(moving_tensors(sent)) == {key_of("x", x) for x in trained}
        assert set(frozen_tensors(sent)) == {key_of("x", x) for x in {"A", "B", "R"} - trained}


def test_a_checkpoint_keeps_cores_and_their_absence(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    adapters = {"x": cored(), "y": replace(cored(1), R=None)}
    directory.save_checkpoint(ServerState(State(round=2, adapters=adapters, head={})))
    found = directory.load_checkpoint()
    assert found is not None
    for name, factors in adapters.items():
        again = found.state.adapters[name]
        assert again.tensors().keys() == factors.tensors().keys()
        assert all(torch.equal(again.tensors()[x], t) for x, t in factors.tensors().items())
