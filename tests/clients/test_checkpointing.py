"""``train.gradient-checkpointing``: the same bits with layers that run twice, alone and in cohorts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from clients.execute import train_instruction
from clients.node import Node
from clients.training.batched import train_cohort
from clients.training.self_check import check_steps
from clients.training.train import LocalResult, train_local
from fedlora import wire
from fedlora.config import RunConfig, TrainConfig, from_flat
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError, RunFailed
from fedlora.models import AdaptedModel, gradient_checkpointing
from fedlora.models.gradient_checkpointing import blocks
from fedlora.server.validate import check
from tests.clients.cohort.samples import mechanism, member, task
from tests.clients.samples import BOTH, PAD, examples
from tests.conftest import tiny_config
from tests.federation.fake_grid import FakeGrid
from tests.in_process import client_runtime, federated
from tests.models.language import ARCHITECTURES, adapted_lm, save_tiny_lm
from tests.models.samples import adapted, random_adapters, save_tiny_gpt2

CLASSIFIERS = {"bert": ("tiny", "mean"), "own head": ("tiny", "model"), "decoder": ("gpt2", "mean")}


def classifier(kind: str, directory: Path) -> tuple[AdaptedModel, Examples]:
    name, pooling = CLASSIFIERS[kind]
    if name == "gpt2":
        model = adapted(str(save_tiny_gpt2(directory / name)), pooling)
        return model, model.task.synthetic_examples(24, model.module.config, PAD)
    return adapted(name, pooling), examples(24)


def trained(model: AdaptedModel, data: Examples, checkpointing: bool) -> tuple[LocalResult, int]:
    """The result of three steps with dropout, and how often the last adapted layer ran."""
    model.checkpointing, calls = checkpointing, []
    model.load(random_adapters(model.modules, 4), {}, trained=BOTH, dropout=0.2, train_head=True)
    layer = model.module.get_submodule(list(model.modules)[-1])
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    config = TrainConfig(learning_rate=0.05, batch_size=8)
    result = train_local(model, data, np.arange(24), PAD, config, local_steps=3, seed=1)
    handle.remove()
    return result, len(calls)


def assert_same_bits(model: AdaptedModel, data: Examples) -> None:
    (kept, once), (again, twice) = trained(model, data, False), trained(model, data, True)
    assert (once, twice) == (3, 6)
    assert again.loss == kept.loss
    for name, factors in kept.adapters.items():
        assert again.adapters[name].A.equal(factors.A)
        assert again.adapters[name].B.equal(factors.B)
    assert all(again.head[name].equal(tensor) for name, tensor in kept.head.items())
    assert not any(block.training or block.gradient_checkpointing for block in blocks(model.module))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_language_models_keep_their_bits(architecture: str, tmp_path: Path) -> None:
    model = adapted_lm(str(save_tiny_lm(tmp_path / architecture, architecture)))
    assert_same_bits(model, model.task.synthetic_examples(24, model.module.config, PAD))


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_keep_their_bits(kind: str, tmp_path: Path) -> None:
    assert_same_bits(*classifier(kind, tmp_path))


def test_cohorts_keep_their_bits() -> None:
    model, runs, calls = adapted(), [], []
    model.module.get_submodule(list(model.modules)[-1]).register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        runs.append(train_cohort(model, [member(model, 0), member(model, 1, rank=2, steps=3)], task()))
        calls.append(0)
    passes = calls.index(0)
    assert sum(calls) == 3 * passes
    for kept, again in zip(*runs, strict=True):
        for name, factors in kept.adapters.items():
            assert again.adapters[name].A.equal(factors.A)
            assert again.adapters[name].B.equal(factors.B)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_opacus_does_not_stand_it(mode: str) -> None:
    """Why private training refuses it: the self-test passes without, and not with it."""
    model = adapted()
    model.load(random_adapters(model.modules, 4), {}, trained=BOTH, train_head=True)
    check_steps(model, PAD, mechanism(grad_sample_mode=mode))
    model.checkpointing = True
    with pytest.raises(RunFailed, match=r"Per sample gradient|Parameter tying"):
        check_steps(model, PAD, mechanism(grad_sample_mode=mode))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"privacy.mode": "example"}, "must be false in private training"),
        ({"lora.dropout": 0.1}, r"with lora\.dropout = 0\.1 engine\.cohort-size must be 1$"),
    ],
)
def test_what_would_not_be_exact_is_refused(keys: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.gradient-checkpointing = true: .*{line}"):
        check(from_flat({"train.gradient-checkpointing": True, **keys}))


def test_one_by_one_and_without_dropout_it_is_accepted() -> None:
    on = {"train.gradient-checkpointing": True}
    check(from_flat(on))
    check(from_flat({**on, "lora.dropout": 0.1, "engine.cohort-size": 1}))
    check(from_flat({**on, "privacy.mode": "client"}))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"true: Sequential has no blocks that can be computed again, acc"):
        blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_a_run_does_as_it_is_told_with_the_same_bits(tmp_path: Path, cache: Path) -> None:
    adapters = []
    for on in (False, True):
        keys = {"train.gradient-checkpointing": on, "num-server-rounds": 1, "engine.device": "cpu"}
        config = tiny_config(**keys)
        federation = federated(config, tmp_path / str(on))

        def client(message: Message, partition: int, config: RunConfig = config) -> Message:
            node = Node(partition_id=partition, state_dir=tmp_path / "clients", simulation=True)
            reply = train_instruction(
                client_runtime(config), wire.decode_instruction(message.content), config, node
            )
            assert client_runtime(config).model.checkpointing == config.train.gradient_checkpointing
            return Message(wire.encode_reply(reply), reply_to=message)

        federation.run(FakeGrid(federation.partitions, client))
        adapters.append(load_file(tmp_path / str(on) / "adapter" / "adapter_model.safetensors"))
    assert all(adapters[1][name].equal(tensor) for name, tensor in adapters[0].items())


def test_a_run_of_a_model_without_blocks_does_not_begin(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**{"train.gradient-checkpointing": True, "engine.device": "cpu"})
    monkeypatch.setattr(gradient_checkpointing, "GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(ConfigError, match=r"true: MeanPooledClassifier has no blocks"):
        federated(config, tmp_path / "run")
