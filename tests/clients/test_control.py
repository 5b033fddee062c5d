"""SCAFFOLD: the paper's own trajectory without its traffic, in hand-made federations and in runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.control import keep_control, off_gradients
from clients.store import ClientStore
from fedlora.config import from_flat
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.validate import check
from tests.clients.cohort.samples import assert_same, member, model, task

STEPS, ETA, WEIGHTS = 10, 0.1, (0.5, 0.3, 0.2)
CURVES, CENTRES = (1.0, 4.0, 0.5), (3.0, -1.0, 2.0)
"""Client k minimises ``a_k / 2 (x - b_k)^2``; together they are at their best in ``sum p a b / sum p a``."""
BEST = sum(p * a * b for p, a, b in zip(WEIGHTS, CURVES, CENTRES, strict=True)) / sum(
    p * a for p, a in zip(WEIGHTS, CURVES, strict=True)
)
ON = {"train.control-variates": True, "train.optimizer": "sgd", "train.learning-rate": ETA}


def walked(x: Tensor, k: int, correction: Tensor, steps: int) -> Tensor:
    """Where client k is after its steps of ``g - correction``."""
    for _ in range(steps):
        x = x - ETA * (CURVES[k] * (x - CENTRES[k]) - correction)
    return x


def controlled(directory: Path, rounds: int, steps: int = STEPS, *, again: int = 0) -> list[float]:
    """The global model after each round, by `clients.control`; one round may be run twice."""
    config = from_flat({**ON, "train.local-steps": steps})
    runtime: Any = SimpleNamespace(data=SimpleNamespace(indices=lambda k: range(3)))
    starts, seen = {1: torch.zeros(1, dtype=torch.float64)}, []
    for number in sorted([*range(1, rounds + 1), *([again] if again else [])]):
        x, ends = starts[number], []
        for k in range(len(CURVES)):
            store = ClientStore(directory)
            resolved: Any = SimpleNamespace(adapters={}, head={"x": x}, store=store)
            h = off_gradients(runtime, resolved, number, config, k).get("x", torch.zeros(1))
            ends.append(walked(x, k, h, steps))
            key = "base_model.model.x"
            keep_control(store, k, number, {key: x}, {key: ends[-1]})
        starts[number + 1] = mean(ends)
        seen.append(float(starts[number + 1]))
    return seen


def scaffold(rounds: int, steps: int = STEPS) -> list[float]:
    """The paper's option II, whose c travels; all clients in every round, weighted."""
    x, c, own = torch.zeros(1, dtype=torch.float64), torch.zeros(1), [torch.zeros(1) for _ in CURVES]
    seen = []
    for _ in range(rounds):
        ends = [walked(x, k, own[k] - c, steps) for k in range(len(CURVES))]
        own = [c_k - c + (x - y) / (steps * ETA) for c_k, y in zip(own, ends, strict=True)]
        x, c = mean(ends), mean(own)
        seen.append(float(x))
    return seen


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([p * v for p, v in zip(WEIGHTS, values, strict=True)]).sum(dim=0)


def fedavg(rounds: int, steps: int = STEPS) -> list[float]:
    x, seen = torch.zeros(1, dtype=torch.float64), []
    for _ in range(rounds):
        x = mean([walked(x, k, torch.zeros(1), steps) for k in range(len(CURVES))])
        seen.append(float(x))
    return seen


def test_it_is_the_papers_trajectory_and_ends_where_fedavg_drifts_away_from(tmp_path: Path) -> None:
    found = controlled(tmp_path, 60)
    assert found == pytest.approx(scaffold(60), abs=1e-12)
    assert found[-1] == pytest.approx(BEST, abs=1e-8)
    assert abs(fedavg(60)[-1] - BEST) > 0.3


def test_one_local_step_is_fedavgs(tmp_path: Path) -> None:
    """The corrections of all clients cancel in the mean."""
    assert controlled(tmp_path, 8, steps=1) == pytest.approx(fedavg(8, steps=1), abs=1e-12)


def test_a_round_that_is_run_again_is_the_same_round(tmp_path: Path) -> None:
    once, twice = controlled(tmp_path / "once", 6), controlled(tmp_path / "twice", 6, again=4)
    assert twice == [*once[:4], *once[3:]]


@pytest.mark.parametrize("config", [{"optimizer": "sgd"}, {"optimizer": "torch.optim:NAdam"}])
def test_a_cohort_takes_off_what_each_of_its_members_does(config: dict[str, Any]) -> None:
    network, members = model(), []
    for number, steps in enumerate((2, 5, 3)):
        plain = member(network, number, steps=steps)
        names = {
            f"{m}.{x}": t for m, f in plain.adapters.items() for x, t in f.tensors().items()
        } | plain.head
        g = torch.Generator().manual_seed(number)
        control = {n: 0.1 * torch.randn(t.shape, generator=g) for n, t in names.items()} if number else {}
        members.append(member(network, number, steps=steps, control=control))
    without = [member(network, number, steps=m.steps) for number, m in enumerate(members)]
    values, plain = (assert_same(network, group, task(**config)) for group in (members, without))
    assert all(torch.equal(t, plain[0][n]) for n, t in values[0].items())
    assert not any(torch.equal(t, plain[1][n]) for n, t in values[1].items())


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"strategy.name": "flora"}, "needs the mean of all that is trained (able: fedavg, ffa,"),
        ({"strategy.name": "fedsa"}, "needs the mean of all that is trained"),
        ({"strategy.robust": "median"}, "without strategy.robust"),
        ({"privacy.mode": "client", "privacy.noise-multiplier": 1.0}, "not kept in private training"),
        ({"train.optimizer": "adamw"}, "train.optimizer = 'adamw' must be 'sgd'"),
        ({"train.momentum": 0.9}, "train.momentum = 0.9 must be 0.0"),
        ({"fraction-train": 0.5}, "fraction-train = 0.5 must be 1.0"),
        ({"upload": "int8"}, "upload = 'int8' must be 'float32'"),
        ({"strategy.server-optimizer": "fedavgm"}, "strategy.server-optimizer = 'fedavgm' must be 'none'"),
        ({"train.local-epochs": 1}, "train.local-epochs = 1 must be 0"),
        ({"client-groups": '[{"partitions": "0", "schedule": "cosine"}]'}, "client-groups: no schedule"),
        ({"client-groups": '[{"partitions": "0", "local-steps": 3}]'}, "client-groups: no local-steps"),
        ({"client-groups": '[{"partitions": "0", "learning-rate": 0.3}]'}, "client-groups: no learning-rate"),
    ],
)
def test_what_is_no_mean_of_sums_of_gradients_is_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises((ConfigError, NotApplicable), match=r"^train\.control-variates = true: ") as error:
        check(from_flat({**ON, **keys}))
    assert line in str(error.value)
    assert "\n" not in str(error.value)
