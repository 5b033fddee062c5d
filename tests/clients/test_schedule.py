"""Learning-rate schedules: the rates of known recipes, a hand-written loop, cohorts, budgets, resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from clients.training.batched import update
from clients.training.batches import load_batch, shuffled_batches
from clients.training.schedule import ONLY_ROUND, ScheduledRates, Stage, rate_factors
from clients.training.train import batch_loss
from fedlora.config import RunConfig, TrainConfig, from_flat, to_flat
from fedlora.core.seeding import stream
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from tests.clients.cohort.samples import alone, assert_same, member, model, privately, task
from tests.clients.cohort.test_orders import PRIVATE, assignments
from tests.clients.cohort.test_orders import alone as replies_alone
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values

STEPS = 7
NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
SCHEDULES = [
    {"schedule": "linear"},
    {"schedule": "cosine", "schedule_over": "run", "warmup_steps": 3},
    {"schedule": "cosine", "schedule_over": "rounds", "schedule_floor": 0.1},
    {"schedule_over": "run", "warmup_steps": 9},
]
LATER = Stage(2, 3)


@pytest.fixture(scope="module")
def network() -> AdaptedModel:
    return model()


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_within_a_round_they_are_those_of_transformers(name: Any, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = transformers.get_scheduler(NAMES[name], optimizer, warmup, STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    config = TrainConfig(schedule=name, warmup_steps=warmup)
    assert [0.3 * f for f in rate_factors(config, STEPS, Stage(2, 5))] == pytest.approx(rates, abs=1e-12)


def test_linear_is_what_floras_clients_train_by() -> None:
    """Their Trainer has no scheduler of its own: the default of transformers, without warm-up, each round."""
    default = transformers.TrainingArguments.__dataclass_fields__["lr_scheduler_type"].default
    assert transformers.SchedulerType(default).value == "linear"
    assert rate_factors(TrainConfig(schedule="linear"), 4, Stage(3, 9)) == (1.0, 0.75, 0.5, 0.25)


def test_the_cosine_of_flowertune() -> None:
    """``min + (max - min) (1 + cos(pi t / T)) / 2`` for round t of T, constant within it."""
    most, least, rounds = 5e-5, 1e-6, 20
    config = TrainConfig(schedule="cosine", schedule_over="rounds", schedule_floor=least / most)
    for t in range(1, rounds + 1):
        wanted = least + 0.5 * (most - least) * (1 + math.cos(math.pi * t / rounds))
        assert [most * f for f in rate_factors(config, 3, Stage(t, rounds))] == pytest.approx([wanted] * 3)
    assert most * rate_factors(config, 1, Stage(rounds, rounds))[0] == pytest.approx(least)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_over_a_run_its_rounds_are_one_long_round(schedule: Any) -> None:
    whole = rate_factors(TrainConfig(schedule=schedule, warmup_steps=5, schedule_floor=0.2), 12, ONLY_ROUND)
    config = TrainConfig(schedule=schedule, schedule_over="run", warmup_steps=5, schedule_floor=0.2)
    parts = [rate_factors(config, 4, Stage(t, 3)) for t in (1, 2, 3)]
    assert sum(parts, ()) == pytest.approx(whole)


def test_training_takes_them(network: AdaptedModel) -> None:
    """A loop by hand, with torch's own scheduler; B and the head have rates of their own."""
    how = {"optimizer": "sgd", "learning_rate": 0.05, "head_learning_rate": 0.5, "loraplus_lr_ratio": 4.0}
    one, given = member(network, 0, steps=5), task(**how, schedule="cosine", schedule_floor=0.1)
    found, _ = alone(network, one, given)
    network.load(one.adapters, one.head, trained=one.trained, modules=one.modules, train_head=True)
    network.module.to(torch.float64)
    with network.training() as trained:
        rates = {name: 0.2 if name.endswith(".B") else 0.05 for name in trained.factors}
        groups = [{"params": [p], "lr": rates[n]} for n, p in trained.factors.items()]
        optimizer = torch.optim.SGD([*groups, {"params": list(trained.head.values()), "lr": 0.5}])
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.1 + 0.9 * (1 + math.cos(math.pi * step / 5)) / 2
        )
        for drawn in shuffled_batches(one.indices, 4, 5, stream(one.seed, "batches")):
            optimizer.zero_grad()
            batch = load_batch(given.examples, drawn, given.pad_token_id, network.device)
            batch_loss(network, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cosine.step()
        for name, parameter in {**trained.factors, **trained.head}.items():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "unequal", "private"),
    [("adamw", False, False), ("adamw", True, False), ("adamw", True, True), ("lora-pro", True, False)],
    ids=["at once", "each alone", "private", "lora-pro"],
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_cohort_equals_its_clients_one_by_one(
    schedule: dict[str, Any], optimizer: str, unequal: bool, private: bool, network: AdaptedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Clients of other step counts have other rates, unless these do not follow from the count."""
    members = [member(network, k, rank=2 + k, steps=2 + k if unequal else 3) for k in range(3)]
    given = replace(task(learning_rate=0.02, optimizer=optimizer, **schedule), stage=LATER)
    made: list[str] = []
    for kind in (update.StackedSteps, update.MemberSteps):
        real = kind.__init__
        monkeypatch.setattr(
            kind, "__init__", lambda self, *a, real=real: made.append(type(self).__name__) or real(self, *a)
        )
    assert_same(network, privately(members) if private else members, given)
    by_count = unequal and schedule.get("schedule_over") != "rounds"
    assert made == ["MemberSteps" if by_count else "StackedSteps"]


def test_every_step_has_its_rate() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.5}])
    rates, seen = ScheduledRates(optimizer, (0.0, 0.5, 1.0)), []
    for _ in range(3):
        rates.advance()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [0.0, 0.25, 0.5]


# --- by client group ---------------------------------------------------------------------------------


def groups(**own: Any) -> str:
    return json.dumps([{"partitions": "0,1", **{k.replace("_", "-"): v for k, v in own.items()}}])


@pytest.mark.parametrize(
    "own",
    [{"learning_rate": 0.01}, {"batch_size": 3}, {"schedule": "cosine"}, {"warmup_steps": 2}],
    ids=str,
)
@pytest.mark.parametrize("keys", [{}, PRIVATE], ids=["plain", "private"])
def test_a_group_trains_as_a_run_with_its_keys(
    own: dict[str, Any], keys: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    everyones = {f"train.{k.replace('_', '-')}": v for k, v in own.items()}
    plain, wholly, mixed = (
        replies_alone(assignments(tiny_config(**keys, **more), tmp_path / str(place)))
        for place, more in enumerate(({}, everyones, {"client-groups": groups(**own)}))
    )
    for place, partition in enumerate((2, 0, 3, 1)):
        same, other = (wholly, plain) if partition < 2 else (plain, wholly)
        for name, tensor in mixed[place].arrays.items():
            assert torch.equal(tensor, same[place].arrays[name])
        assert any(not torch.equal(t, other[place].arrays[n]) for n, t in mixed[place].arrays.items())


def test_rates_cost_no_privacy(tmp_path: Path, cache: Path) -> None:
    """What is spent, and the noise of each step, are those of a constant rate."""
    scheduled = {"train.schedule": "cosine", "train.schedule-over": "run", "train.warmup-steps": 1}
    plain, falling = (
        replies_alone(assignments(tiny_config(**PRIVATE, **more), tmp_path / str(place)))
        for place, more in enumerate(({}, scheduled))
    )
    for one, other in zip(plain, falling, strict=True):
        assert one.privacy is not None
        assert other.privacy is not None
        apart = {"ledger_head"}
        assert {k: v for k, v in one.privacy.items() if k not in apart} == {
            k: v for k, v in other.privacy.items() if k not in apart
        }
        assert any(not torch.equal(t, other.arrays[n]) for n, t in one.arrays.items())


# --- runs --------------------------------------------------------------------------------------------

COSINE = {"train.schedule": "cosine", "train.schedule-over": "run"}


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path: Path, cache: Path) -> None:
    whole = run(tmp_path / "whole", **COSINE)

    class Stopped(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "cut", progress=stop, **COSINE)
    again = run(tmp_path / "cut", resume=True, **COSINE)
    for name, tensor in values(whole).items():
        assert torch.equal(values(again)[name], tensor), name


def test_a_run_whose_rates_follow_from_its_length_keeps_it(tmp_path: Path, cache: Path) -> None:
    run(tmp_path, **{**COSINE, "num-server-rounds": 1})
    with pytest.raises(ConfigError, match=r"num-server-rounds = 2: the run in .* has 1; it cannot change"):
        run(tmp_path, resume=True, **{**COSINE, "num-server-rounds": 2})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"train.schedule": "cosine", "train.schedule-over": "rounds"},
            r"train.schedule-floor = 0.0: must be > 0 where train.schedule-over = 'rounds', whose last",
        ),
        ({"train.warmup-steps": 10}, r"train.warmup-steps = 10: must be < 10, .* = 'round'"),
        ({"train.warmup-steps": 100, "train.schedule-over": "run"}, "must be < 100"),
        ({"train.warmup-steps": 10, "train.schedule-over": "rounds"}, "must be < 10"),
        ({"train.schedule": "step"}, "train.schedule = 'step': accepted are constant, linear, cosine"),
        (
            {"train.warmup-steps": 4, "client-groups": groups(local_steps=4)},
            r"client-groups warmup-steps = 4: must be < 4",
        ),
        ({"client-groups": groups(batch_size=0)}, "client-groups batch-size = 0: must be > 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_flat(keys)


def test_a_warm_up_of_epochs_is_left_to_the_data() -> None:
    assert from_flat({"train.warmup-steps": 50, "train.local-epochs": 2}).train.warmup_steps == 50


def test_a_group_without_keys_of_train_has_the_runs() -> None:
    config = RunConfig(client_groups=groups(rank=2))
    assert config.train_of(0) == config.train
    assert to_flat(config)["train.schedule"] == "constant"
