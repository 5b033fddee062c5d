"""The codec of changed directions: what it writes, by hand, and one line for whatever it would not write."""

from __future__ import annotations

import pytest
import torch

from fedlora import wire
from fedlora.core.factors import Tensors
from fedlora.core.seeding import torch_stream
from fedlora.errors import UpdateRefused
from fedlora.wire.changed import MOST, PLACE, Changed

A, B = (f"base_model.model.q.lora_{x}.weight" for x in "AB")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def encoded(start: Tensors, trained: Tensors) -> Tensors:
    return Changed().encode(start, trained, torch_stream(0, "upload"), 0)


def test_only_what_changed_travels_and_nothing_is_lost() -> None:
    start = {A: normal(4, 6), B: normal(5, 4), "w": normal(3)}
    trained = {name: tensor.clone() for name, tensor in start.items()}
    trained[A][[1, 3]] += 1.0
    trained[B][:, 2] = 7.0
    trained["w"] += 1.0
    arrays = encoded(start, trained)
    assert arrays[A].shape == (2, 6)
    assert arrays[B].shape == (5, 1)
    assert arrays[B + PLACE].tolist() == [2]
    assert sum(t.nbytes for t in arrays.values()) == 4 * (2 * 6 + 5 + 3) + 2 + 1
    found = Changed().decode(start, arrays)
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())


def test_nothing_and_everything() -> None:
    start = {A: normal(4, 6), B: normal(5, 4)}
    arrays = encoded(start, start)
    assert sum(t.nbytes for t in arrays.values()) == 0
    through = wire.from_record(wire.to_record(arrays, None, packed=True), coded=True)
    assert all(torch.equal(t, start[name]) for name, t in Changed().decode(start, through).items())
    other = {name: tensor + 1 for name, tensor in start.items()}
    assert encoded(start, other).keys() == start.keys()


def test_directions_beyond_a_byte_travel_whole() -> None:
    start = {A: torch.zeros(MOST, 2), B: torch.zeros(2, MOST + 1)}
    trained = {A: start[A].clone(), B: start[B].clone()}
    trained[A][-1], trained[B][:, -1] = 1.0, 1.0
    arrays = encoded(start, trained)
    assert {name: tuple(t.shape) for name, t in arrays.items()} == {
        A: (1, 2), A + PLACE: (1,), B: (2, MOST + 1),
    }  # fmt: skip
    found = Changed().decode(start, arrays)
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())


def test_bytes_of_a_budget_are_those_of_its_largest_directions() -> None:
    tensors = {A: normal(4, 6), "base_model.model.k.lora_A.weight": normal(4, 9), "w": normal(3)}
    assert wire.most_bytes("changed", tensors, 5) == 4 * 3 + 4 * (4 * 9 + 1) + (4 * 6 + 1)
    assert wire.most_bytes("changed", tensors, 8) == wire.most_bytes("changed", tensors) == 4 * (24 + 36 + 3)
    assert wire.most_bytes("int8", tensors, 1) == wire.most_bytes("int8", tensors)


def byte(*places: int) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.uint8)


ROWS = normal(2, 6)
WRONG: dict[str, tuple[Tensors, str]] = {
    "falling": ({A: ROWS, A + PLACE: byte(3, 1)}, "its directions do not rise"),
    "doubled": ({A: ROWS, A + PLACE: byte(1, 1)}, "its directions do not rise"),
    "beyond the rank": ({A: ROWS, A + PLACE: byte(1, 4)}, "not below 4"),
    "the last of all bytes": ({A: ROWS, A + PLACE: byte(1, 255)}, "not below 4"),
    "floats": ({A: ROWS, A + PLACE: torch.tensor([1.0, 2.0])}, "is float32"),
    "signed": ({A: ROWS, A + PLACE: torch.tensor([-1, 2], dtype=torch.int8)}, "is int8"),
    "fewer": ({A: ROWS, A + PLACE: byte(1)}, r"is float32 \(2, 6\), expected float32 \(1, 6\)"),
    "more": ({A: ROWS, A + PLACE: byte(0, 1, 2)}, r"is float32 \(2, 6\), expected float32 \(3, 6\)"),
    "a million": ({A: ROWS, A + PLACE: byte(0).repeat(10**6)}, "its directions do not rise"),
    "of two axes": ({A: ROWS, A + PLACE: byte(0, 1).reshape(1, 2)}, r"is uint8 \(1, 2\), expected uint8"),
    "no list": ({A: ROWS, A + PLACE: byte(0).reshape(())}, r"is uint8 \(\), expected uint8 \(1,\)"),
    "none for some": ({A: ROWS, A + PLACE: byte()}, r"expected float32 \(0, 6\)"),
    "longer rows": ({A: normal(2, 7), A + PLACE: byte(0, 1)}, r"is float32 \(2, 7\), expected float32"),
    "half rows": ({A: ROWS.half(), A + PLACE: byte(0, 1)}, "is float16"),
    "whole numbers": ({A: ROWS.int(), A + PLACE: byte(0, 1)}, "sends floats"),
    "of no factor": ({"w": normal(3), "w" + PLACE: byte(0)}, "it has none"),
    "alone": ({A + PLACE: byte(0)}, f"unknown tensor {A}{PLACE}"),
    "of a stranger": ({"x": ROWS, "x" + PLACE: byte(0, 1)}, "unknown tensor x"),
}


@pytest.mark.parametrize("how", WRONG)
def test_directions_that_cannot_be_are_refused_in_one_line(how: str) -> None:
    arrays, words = WRONG[how]
    start = {A: normal(4, 6), "w": normal(3)}
    before = {name: tensor.clone() for name, tensor in start.items()}
    with pytest.raises(UpdateRefused, match=words) as caught:
        Changed().decode(start, arrays)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.items())
