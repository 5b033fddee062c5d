"""EVA and LoRA-GA as runs: made once by the server out of public examples, never out of anybody's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.training.batches import load_batch
from fedlora.config import RunConfig
from fedlora.core.init_eva import InputMoments
from fedlora.core.seeding import stream
from fedlora.core.state import State
from fedlora.data.builtin.synthetic import MOODS, NEUTRAL
from fedlora.errors import ConfigError
from fedlora.prepared.cache import open_prepared, prepare
from fedlora.server import public_data
from fedlora.server.build import assemble
from fedlora.server.validate import check
from fedlora.tasks.task import inputs
from tests.conftest import tiny_config
from tests.in_process import client_runtime
from tests.models.samples import logits, random_patch, token_batch

PRIVATE = {"privacy.mode": "example", "privacy.target-epsilon": 4.0, "privacy.accountant": "rdp"}
every_kind = pytest.mark.parametrize("kind", ["eva", "lora-ga"])


@pytest.fixture(scope="module")
def moods(cache: Path) -> Path:
    """Public sentences with the labels of the synthetic data, in other words and of unequal length."""
    rng, rows = np.random.default_rng(11), []
    for number in range(80):
        mood = list(MOODS)[number % len(MOODS)]
        words = [*rng.choice(MOODS[mood].split(), 2), *rng.choice(NEUTRAL.split(), 3 + number % 5)]
        rows.append(json.dumps({"text": " ".join(words), "label": mood}))
    path = cache / "starts.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def config_of(kind: str, moods: Path | str, **keys: object) -> RunConfig:
    settings = {"strategy.init-a": kind, "strategy.init-examples": 20, "data.public": str(moods)}
    return tiny_config(**{**settings, "engine.device": "cpu", **keys})


def begun(config: RunConfig) -> State:
    """The state before round 1, as the server makes it."""
    runtime = client_runtime(config)
    strategy = assemble(
        check(config),
        config,
        runtime,
        range(2),
        simulation=True,
        known_examples=lambda partition: None,
        packed=False,
    )
    assert strategy.state is not None
    return strategy.state


@every_kind
def test_the_server_starts_from_the_function_of_the_base(kind: str, moods: Path) -> None:
    """Whatever was left in the process's model, and with the same bits for the same configuration."""
    config = config_of(kind, moods)
    model = client_runtime(config).model
    state, batch = begun(config), token_batch()
    model.load({n: replace(f, B=torch.zeros_like(f.B)) for n, f in state.adapters.items()}, {})
    before = logits(model.module, batch)
    runtime, patch = client_runtime(config), random_patch(model.modules, 2, 0)
    runtime.move_to((patch.digest(),), lambda _: patch)
    again = begun(config)
    assert all(
        again.adapters[n].A.equal(f.A) and again.adapters[n].B.equal(f.B) for n, f in state.adapters.items()
    )
    patches = {p.digest(): p for p in state.base}
    runtime.move_to(tuple(patches), patches.__getitem__)
    model.load(state.adapters, {})
    torch.testing.assert_close(logits(model.module, batch), before, rtol=1e-4, atol=1e-5)
    assert len(state.base) == (kind == "lora-ga")


def test_evas_inputs_are_those_of_the_public_tokens_without_padding(moods: Path) -> None:
    config = config_of("eva", moods)
    runtime = client_runtime(config)
    found = public_data.first_inputs(runtime, config, 20)
    examples = open_prepared(prepare(replace(config, data=public_data.public_data(config.data)))).train
    chosen = stream(config.seed, "public").permutation(len(examples))[:20]
    wanted = InputMoments(runtime.model.modules)
    for index in chosen:  # one by one there is no padding
        batch = load_batch(examples, np.array([index]), runtime.data.pad_token_id, runtime.model.device)
        with (
            runtime.model.base.watched_inputs(lambda name, x: wanted.add(name, x.flatten(0, 1))),
            torch.no_grad(),
        ):
            runtime.model.module(**inputs(runtime.model.module, batch))
    assert found.count == wanted.count == dict.fromkeys(found.count, int(examples.lengths_of(chosen).sum()))
    for name in runtime.model.modules:
        overlap = torch.linalg.svdvals(found.directions(name, 4) @ wanted.directions(name, 4).T)
        assert overlap.min() > 0.999


@every_kind
def test_private_runs_take_public_examples_and_none_of_the_clients(kind: str, moods: Path) -> None:
    check(config_of(kind, moods, **PRIVATE))
    for keys in ({}, PRIVATE):
        with pytest.raises(ConfigError) as error:
            check(config_of(kind, "", **keys))
        assert str(error.value) == (
            f"data.public = '': strategy.init-a = '{kind}' looks at public examples, name some"
        )


def test_eva_takes_mixed_ranks_and_lora_ga_does_not(moods: Path) -> None:
    """The leading rows of EVA's A are EVA's A of a lower rank, and the base stays."""
    mixed = {"strategy.name": "flexlora", "lora.ranks": "2,4"}
    check(config_of("eva", moods, **mixed))
    with pytest.raises(ConfigError, match=r"^strategy\.init-a = 'lora-ga': needs equal ranks, not \[2, 4\]"):
        check(config_of("lora-ga", moods, **mixed))
