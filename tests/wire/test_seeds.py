"""Seeds and moves: what arrives is what the steps made, and what is nothing of the kind is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedlora import wire
from fedlora.core.factors import Tensors
from fedlora.core.perturbations import perturbation
from fedlora.errors import ConfigError, UpdateRefused
from fedlora.wire.seeds import MOST_MOVES, MOVES, SEED, written

CODEC = wire.CODECS["seeds"]
START = {"layer.lora_A.weight": torch.ones(4, 6), "head.bias": torch.zeros(3)}
TOLD = written(7, torch.tensor([0.5, -0.25, 0.125]))


def test_what_arrives_are_the_moves_along_what_the_seed_draws() -> None:
    found = CODEC.decode(START, TOLD)
    assert found.keys() == START.keys()
    for key, before in START.items():
        parts = [a * perturbation(7, t, key, before.shape) for t, a in enumerate((0.5, -0.25, 0.125))]
        torch.testing.assert_close(found[key], before + sum(parts))
        assert found[key].dtype == torch.float32


def test_perturbations_are_standard_normal_and_differ_by_seed_step_and_tensor() -> None:
    shape = torch.Size((200, 500))
    given = [(1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b")]
    drawn = torch.stack([perturbation(*one, shape).flatten() for one in given])
    assert drawn.mean(1).abs().max() < 0.016  # 5 standard errors
    assert ((drawn @ drawn.T / 1e5) - torch.eye(4)).abs().max() < 0.023  # the variance's are sqrt(2) as large


def test_bytes_follow_from_the_steps_alone() -> None:
    record = wire.to_record(TOLD, None)
    assert wire.nbytes(record) == CODEC.most_bytes(START, 0, 3) == 8 + 4 * 3
    assert wire.most_bytes("seeds", START) == wire.most_bytes("seeds", {}) < 18_000


def test_more_steps_than_are_taken_are_refused_on_both_sides() -> None:
    written(7, torch.zeros(MOST_MOVES))
    with pytest.raises(ConfigError, match=rf"^upload = 'seeds': {MOST_MOVES + 1} local steps, at most"):
        written(7, torch.zeros(MOST_MOVES + 1))
    with pytest.raises(UpdateRefused, match=f"{MOST_MOVES + 1} steps, at most {MOST_MOVES} are taken"):
        CODEC.decode(START, {**TOLD, MOVES: torch.zeros(MOST_MOVES + 1)})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a.pop(SEED), "its arrays are seeds/moves, not seeds/seed, seeds/moves"),
        (lambda a: a.pop(MOVES), "its arrays are seeds/seed, not"),
        (lambda a: a.clear(), "its arrays are none, not"),
        (lambda a: a.update(more=torch.ones(1)), "its arrays are more, seeds/moves, seeds/seed, not"),
        (lambda a: a.update({SEED: torch.tensor([1, 2])}), r"seed is int64 \(2,\), expected uint8 \(8,\)"),
        (lambda a: a.update({SEED: torch.tensor([0.5])}), "seeds/seed is float32"),
        (lambda a: a.update({MOVES: torch.ones(3, dtype=torch.float64)}), "seeds/moves is float64"),
        (lambda a: a.update({MOVES: torch.ones(3, 1)}), r"seeds/moves is float32 \(3, 1\)"),
        (lambda a: a.update({MOVES: torch.tensor([1.0, torch.nan])}), "seeds/moves: a NaN or an infinity"),
        (lambda a: a.update({MOVES: torch.tensor([torch.inf])}), "seeds/moves: a NaN or an infinity"),
    ],
)
def test_what_is_nothing_of_the_kind_is_refused(spoil: Callable[[Tensors], object], words: str) -> None:
    arrays = dict(TOLD)
    spoil(arrays)
    with pytest.raises(UpdateRefused, match=words) as error:
        CODEC.decode(START, arrays)
    assert "\n" not in str(error.value)


def test_a_seed_of_any_size_is_taken() -> None:
    for seed in (0, 1, 2**63, 2**64 - 1):
        assert torch.isfinite(CODEC.decode(START, written(seed, torch.ones(2)))["head.bias"]).all()


def test_another_change_cannot_be_written() -> None:
    with pytest.raises(
        ConfigError, match=r"^upload = 'seeds': tells steps of train.gradient = 'forward' alone"
    ):
        CODEC.encode(START, START, torch.Generator(), 0)
