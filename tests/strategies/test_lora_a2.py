"""LoRA-A2: each client's largest changes of the weight are what it sends, at the bytes of its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora import wire
from fedlora.core.directions import most_changed
from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientSpec
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.validate import check
from strategies.flower import FactorStrategy
from strategies.registry import make_rule
from strategies.uploads import checked_upload
from tests.clients.cohort.test_runs import run
from tests.conftest import tiny_config
from tests.strategies.federations import one_layer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(seed: int) -> dict[str, LoraFactors]:
    return {
        name: LoraFactors(normal(4, 6, seed=k), normal(5, 4, seed=k + 1), 0.5 + k)
        for k, name in enumerate("pq")
    }


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_largest_changes_of_the_weight_stay(factor: str, count: int) -> None:
    """Against the dense changes of the weight, one direction after the other."""
    start = layers(0)
    trained = {
        name: f.replaced({factor: f.tensors()[factor] + normal(*f.tensors()[factor].shape, seed=9)})
        for name, f in start.items()
    }
    found = most_changed(start, trained, count)
    changes = {}
    for name in start:
        for j in range(4):
            before, now = (
                f[name].scaling * torch.outer(f[name].B[:, j], f[name].A[j]) for f in (start, trained)
            )
            changes[name, j] = float((now - before).norm())
    kept = sorted(changes, key=lambda place: -changes[place])[:count]
    for name, f in found.items():
        for j in range(4):
            wanted = trained[name] if (name, j) in kept else start[name]
            assert torch.equal(f.A[j], wanted.A[j])
            assert torch.equal(f.B[:, j], wanted.B[:, j])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_chosen_before_any_other(value: float) -> None:
    """So that the server sees it and refuses, and nobody who diverged looks as if it had trained a little."""
    start = layers(0)
    trained = {name: f.replaced({"B": f.B + normal(5, 4, seed=9)}) for name, f in start.items()}
    trained["q"].B[2, 3] = value
    found = most_changed(start, trained, 1)
    assert not torch.isfinite(found["q"].B[:, 3]).all()
    assert torch.equal(found["p"].B, start["p"].B)


def test_clients_get_the_global_rank_and_their_budget() -> None:
    rule = make_rule("lora-a2", {"rank": 5})
    federation = one_layer()
    state = federation.start(rule)
    assert state.adapters["layer"].rank == 5
    for rank, choose in ((2, 2), (5, 0)):
        given = rule.broadcast(state, ClientSpec(partition_id=0, rank=rank, scaling=1.0))
        assert (given.adapters["layer"].rank, given.choose) == (5, choose)


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_run_sends_what_each_client_may(private: bool, cache: Path, tmp_path: Path) -> None:
    """Three clients of the global rank 4 and one of a quarter of it; B in round 1, then A.

    Of values alone, in which every direction moves: steps in the tiny model's queries are lost in rounding.
    """
    keys: dict[str, Any] = {
        "strategy.name": "lora-a2", "lora.ranks": "4,1,4,4", "num-server-rounds": 2,
        "model.head": "freeze", "train.optimizer": "sgd", "train.learning-rate": 0.5,
        "strategy.screening": "off", "lora.target-modules": "value",
    }  # fmt: skip
    if private:
        keys |= {"privacy.mode": "example", "privacy.target-epsilon": 20.0, "privacy.accountant": "rdp"}
    config = tiny_config(**keys)
    moved, _, records = run(config, tmp_path / "one", together=False)
    layers = len(moved)
    (out, inner), *others = {tuple(t.shape) for t in moved.values()}
    assert not others
    for record, width in zip(records, (out, inner), strict=True):
        assert record["refused"] == {}
        budget = layers  # directions of the small client, a byte for each
        assert record["bytes_up"] == 3 * 4 * layers * 4 * width + budget * (4 * width + 1)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^strategy\.options rank = -1: must be >= 0$"):
        make_rule("lora-a2", {"rank": -1})
    with pytest.raises(ConfigError, match=r"^strategy\.options rank = 2: must be at least 3"):
        one_layer().start(make_rule("lora-a2", {"rank": 2}))
    with pytest.raises(NotApplicable, match=r"vera.*lora-a2 reads the product of A and B"):
        check(tiny_config(**{"strategy.name": "lora-a2", "lora.method": "vera"}))


def test_its_codec_is_its_own_unless_another_is_named() -> None:
    rule = make_rule("lora-a2")
    assert FactorStrategy(rule).transport.upload == "changed"
    assert FactorStrategy(rule, upload="int8").transport.upload == "int8"
    assert FactorStrategy(make_rule("rolora")).transport.upload == "float32"
    assert checked_upload("changed", make_rule("fedavg"), client_dp=False) == "changed"
    assert np.isclose(wire.codec_named("changed").error, 0)
