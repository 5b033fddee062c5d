"""Fed-SB as whole runs, with clients in this process: what travels, what is spent, resuming and export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from clients.execute import train_instruction
from clients.node import Node
from clients.training.batches import load_batch
from clients.training.train import batch_loss
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.seeding import stream
from fedlora.data.builtin.synthetic import MOODS, NEUTRAL, synthetic_table
from fedlora.errors import ConfigError
from fedlora.models.export import load_adapter
from fedlora.prepared.cache import open_prepared, prepare
from fedlora.server import public_data
from fedlora.server.federated_run import FederatedRun
from tests.conftest import tiny_config
from tests.federation.fake_grid import FakeGrid
from tests.in_process import client_runtime, federated
from tests.models.samples import adapted, logits, random_adapters, random_patch, token_batch

pytestmark = pytest.mark.slow

RANK = 4


@pytest.fixture(scope="module")
def moods(cache: Path) -> Path:
    """Public examples with the labels of the synthetic data, in other words."""
    rng, rows = np.random.default_rng(7), []
    for number in range(100):
        mood = list(MOODS)[number % len(MOODS)]
        words = [*rng.choice(MOODS[mood].split(), 2), *rng.choice(NEUTRAL.split(), 5)]
        rows.append({"text": " ".join(words), "label": mood})
    return written(cache / "public_data.jsonl", rows)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(subspace: str, moods: Path, core: str = "dense", heads: int = 1, **keys: Any) -> RunConfig:
    options = json.dumps({"subspace": subspace, "core": core, "heads": heads, "public-examples": 30})
    settings = {"strategy.name": "fed-sb", "strategy.options": options, "lora.rank": RANK}
    settings |= {"num-server-rounds": 4, "train.local-steps": 1, "partitions": "0,2", "engine.device": "cpu"}
    return tiny_config(**{**settings, "data.public": str(moods), **keys})


def run(config: RunConfig, path: Path, stop_after: int = 0) -> FederatedRun:
    """The rounds that are left, in this process; ``stop_after`` breaks it off."""

    def client(message: Message, partition: int) -> Message:
        node = Node(partition_id=partition, state_dir=path / "clients", simulation=True)
        reply = train_instruction(
            client_runtime(config), wire.decode_instruction(message.content), config, node
        )
        return Message(wire.encode_reply(reply), reply_to=message)

    def progress(record: dict[str, Any]) -> None:
        if record["round"] == stop_after:
            raise KeyboardInterrupt

    federation = federated(config, path, progress, resume=True)
    federation.run(FakeGrid(federation.partitions, client))
    return federation


@pytest.mark.parametrize(
    ("subspace", "core", "heads"),
    [
        ("random", "dense", 1),
        ("private", "dense", 1),
        ("public", "dense", 1),
        ("private", "diagonal", 1),
        ("principal", "diagonal", 1),
        ("ldu", "dense", 1),
        ("cosine", "dense", 2),
    ],
)
def test_a_run_ships_what_is_declared_and_exports_its_last_model(
    subspace: str, core: str, heads: int, moods: Path, tmp_path: Path
) -> None:
    federation = run(config_of(subspace, moods, core, heads), tmp_path)
    modules, head = federation.runtime.model.modules, sum(t.numel() for t in federation.state.head.values())
    numbers = {
        "A": RANK * sum(m.in_features for m in modules.values()),
        "B": RANK * sum(m.out_features for m in modules.values()),
        "R": RANK**2 // (RANK if core == "diagonal" else heads) * len(modules),
    }
    sent = ["B", "A", "R", "R"] if subspace == "private" else ["R"] * 4
    clients = len(federation.partitions)
    records = federation.directory.rounds()
    assert [r["bytes_up"] for r in records] == [4 * clients * (numbers[f] + head) for f in sent]
    assert records[-1]["bytes_down"] == 4 * clients * (numbers["R"] + head)
    assert all(r["gap"] < 1e-5 and r["update_norm"] > 0 and r["refused"] == {} for r in records)

    exported, _ = load_adapter(tmp_path / "adapter")
    model = federation.runtime.model
    model.load(federation.state.adapters, federation.state.head)
    batch = token_batch()
    torch.testing.assert_close(logits(exported, batch), logits(model.module, batch), rtol=1e-4, atol=1e-5)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("lora_R" in key for key in keys)


@pytest.mark.parametrize(
    ("subspace", "core", "stop"),
    [("random", "dense", 1), ("private", "dense", 1), ("private", "dense", 2), ("ldu", "diagonal", 1)],
)
def test_a_stopped_run_goes_on_with_the_same_bits(
    subspace: str, core: str, stop: int, moods: Path, tmp_path: Path
) -> None:
    config = config_of(subspace, moods, core)
    run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", stop_after=stop)
    run(config, tmp_path / "stopped")
    whole, resumed = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_the_private_subspace_is_paid_for(moods: Path, tmp_path: Path) -> None:
    """Every round costs, those of B and A too, and together they stay within the budget."""
    private = {"privacy.mode": "example", "privacy.target-epsilon": 4.0, "privacy.accountant": "rdp"}
    federation = run(config_of("private", moods, **private), tmp_path)
    spent = [r["epsilon"] for r in federation.directory.rounds()]
    assert all(a < b for a, b in zip([0.0, *spent], spent, strict=False))
    assert 3.9 < spent[-1] <= 4.0


# --- the gradient on public examples ------------------------------------------------------------------


def test_the_first_gradient_is_that_of_the_mean_loss_at_the_base(moods: Path) -> None:
    """Whatever a client left in the model: adapter, head and base patches."""
    config = config_of("public", moods)
    runtime = client_runtime(config)
    model, patch = runtime.model, random_patch(runtime.model.modules, 2, 0)
    runtime.move_to((patch.digest(),), lambda _: patch)
    model.load(random_adapters(model.modules, 3), {n: t + 1 for n, t in model.initial_head.items()})
    found = public_data.first_gradients(runtime, config, 30)
    examples = open_prepared(prepare(replace(config, data=public_data.public_data(config.data)))).train
    chosen = stream(config.seed, "public").permutation(len(examples))[:30]
    pristine = adapted(num_labels=runtime.data.num_labels, seed=config.seed)
    pristine.load(fresh_adapters(model.modules, 1, 1.0, 0), {})
    batch = load_batch(examples, chosen, runtime.data.pad_token_id, pristine.device)
    with pristine.base.gradients() as gradients_of:
        wanted = gradients_of(batch_loss(pristine, batch))
    assert set(found) == set(model.modules)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.norm()))


def test_no_example_of_the_run_itself_is_public(moods: Path, tmp_path: Path) -> None:
    """A copy of the clients' data under another name is seen through, train and test."""
    own = [{"text": row["text"], "label": row["label"]} for row in synthetic_table()]
    copy = written(tmp_path / "copy.jsonl", own)
    config = config_of("public", copy)
    with pytest.raises(ConfigError, match=r"^data\.public = .*: has 0 training examples that are not in"):
        public_data.first_gradients(client_runtime(config), config, 1)


def test_public_examples_with_other_labels_or_none_are_refused(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": f"note {i} of many", "label": ("good", "bad")[i % 2]} for i in range(60)]
    other = config_of("public", written(tmp_path / "other.jsonl", rows))
    with pytest.raises(ConfigError, match=r"its labels are 'bad', 'good', the run has 'calm'"):
        public_data.first_gradients(client_runtime(other), other, 1)
    nowhere = config_of("public", tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"^data\.public = .*nowhere.jsonl': no such file"):
        public_data.first_gradients(client_runtime(nowhere), nowhere, 1)
