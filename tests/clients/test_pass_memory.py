"""Micro-batches from memory: what autograd keeps, the same bits as the explicit number, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.rehearsal import rehearse
from clients.training.pass_memory import GIB, kept_bytes, with_passes
from fedlora.config import TrainConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.errors import ConfigError
from fedlora.server.validate import check
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values
from tests.in_process import client_runtime
from tests.tasks.test_preference import jsonl, rows
from tests.tasks.test_preference import keys as pairs


@pytest.fixture
def given(cache: Path) -> tuple[Any, Any, np.ndarray, int]:
    runtime = client_runtime(tiny_config())
    model = runtime.model
    model.load(fresh_adapters(model.modules, 4, 2.0, 0), {}, trained=frozenset("AB"), train_head=True)
    return model, runtime.data.train, runtime.data.indices(0), runtime.data.pad_token_id


def test_what_is_kept_grows_by_the_example(given: tuple[Any, Any, np.ndarray, int]) -> None:
    model, examples, own, pad = given
    longest = own[[int(examples.lengths_of(own).argmax())]]
    one, two, five = (kept_bytes(model, examples, np.repeat(longest, n), pad) for n in (1, 2, 5))
    assert five - two == pytest.approx(3 * (two - one), rel=0.02)
    hidden = int(examples.lengths_of(longest)[0]) * 32 * 4
    assert one > 10 * hidden  # two layers keep more than ten states of a sequence
    weights = sum(p.numel() * 4 for p in model.module.parameters())
    assert one < weights


def test_the_most_that_fits(given: tuple[Any, Any, np.ndarray, int]) -> None:
    model, examples, own, pad = given
    longest = own[[int(examples.lengths_of(own).argmax())]]
    for number in (1, 3, 6):
        memory = (kept_bytes(model, examples, np.repeat(longest, number), pad) + 999) / GIB
        assert (
            with_passes(model, examples, own, pad, TrainConfig(pass_memory=memory)).micro_batch_size == number
        )
    off = TrainConfig()
    assert with_passes(model, examples, own, pad, off) is off
    before = torch.random.get_rng_state()
    with pytest.raises(ConfigError, match=r"^train\.pass-memory = 1e-06: an example of \d+ tokens alone"):
        with_passes(model, examples, own, pad, TrainConfig(pass_memory=1e-6))
    assert torch.equal(before, torch.random.get_rng_state())


def test_of_pairs(tmp_path: Path, cache: Path) -> None:
    runtime = client_runtime(tiny_config(**pairs(jsonl(tmp_path / "pairs.jsonl", rows()))))
    model, data = runtime.model, runtime.data
    model.load(fresh_adapters(model.modules, 4, 2.0, 0), {}, trained=frozenset("AB"))
    config = TrainConfig(pass_memory=0.5)
    assert with_passes(model, data.train, data.indices(0), data.pad_token_id, config).micro_batch_size > 1


def test_same_bits_as_the_explicit_number(given: tuple[Any, Any, np.ndarray, int], tmp_path: Path) -> None:
    model, examples, _, pad = given
    everyone = np.arange(len(examples))
    longest = everyone[[int(examples.lengths.argmax())]]
    memory = (kept_bytes(model, examples, np.repeat(longest, 3), pad) + 999) / GIB
    keys = {"num-server-rounds": 1, "engine.cohort-size": 1, "partitions": "0"}
    own = examples.lengths_of(client_runtime(tiny_config()).data.indices(0)).max()
    assert own == examples.lengths.max()
    follows = run(tmp_path / "follows", **keys, **{"train.pass-memory": memory})
    explicit = run(tmp_path / "explicit", **keys, **{"train.micro-batch-size": 3})
    whole = run(tmp_path / "whole", **keys)
    for name, tensor in values(follows).items():
        assert torch.equal(tensor, values(explicit)[name])
    assert any(not torch.equal(t, values(whole)[name]) for name, t in values(follows).items())


def test_refusals_before_anything_is_started(given: tuple[Any, Any, np.ndarray, int]) -> None:
    memory = {"train.pass-memory": 0.5}
    for more, why in (
        ({"privacy.mode": "example"}, r"privacy\.max-physical-batch-size is that there$"),
        ({"train.micro-batch-size": 2}, r"train\.micro-batch-size is set$"),
        ({"engine.cohort-size": 4}, r"engine\.cohort-size = 4 must be 1$"),
    ):
        with pytest.raises(ConfigError, match=rf"^train\.pass-memory = 0\.5: {why}"):
            check(tiny_config(**memory, **more))
    config = tiny_config(**{"train.pass-memory": 1e-6, "engine.cohort-size": 1})
    runtime = client_runtime(config)
    start = fresh_adapters(runtime.model.modules, 4, 2.0, 0)
    with pytest.raises(ConfigError, match=r"^train\.pass-memory = 1e-06"):
        rehearse(runtime, config, start, {}, frozenset("AB"))
