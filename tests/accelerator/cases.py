"""What runs on a device, held to the CPU's result: trainers, cohorts, evaluation, base moves, whole runs.

`tests.accelerator.test_pretend` runs this file in a process of its own. What this device cannot show:
``train.precision = "bfloat16"`` (Python lends no kernels for autocast), 4 bits (bitsandbytes has kernels of
its own), dropout as a GPU draws it (here it is the CPU's, so that results can be compared), memory, speed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedlora
from clients.evaluation import evaluate
from clients.training.batched import train_cohort
from clients.training.batches import load_batch
from clients.training.dp_sgd import train_private
from clients.training.train import LocalResult, batch_loss, train_local
from fedlora.adapters import adapter_kind
from fedlora.config import LoraConfig, ModelConfig, TrainConfig
from fedlora.core.factors import Tensors
from fedlora.core.state import RankRegularizer
from fedlora.data.examples import Examples
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.server.generation import continued
from fedlora.tasks import task_named
from tests.accelerator.pretend import NAME, SYNCHRONISATIONS
from tests.clients.cohort.samples import mechanism, member, privately, task
from tests.clients.samples import BOTH, PAD, examples
from tests.conftest import tiny_config
from tests.models.samples import random_adapters, random_patch

DATA = examples(40)
TEXTS = replace(DATA, tokens=DATA.tokens % 250, labels=np.zeros_like(DATA.labels))


def model(device: str, kind: str = "tiny", method: str = "lora") -> AdaptedModel:
    """The tiny classifier or language model on a device."""
    found = task_named("causal-lm" if kind == "tiny-lm" else "classification")
    module = build_model(ModelConfig(name=kind), 0 if kind == "tiny-lm" else 2, 0, found.network).to(device)
    adapter = adapter_kind(LoraConfig(method=method), 0)
    return AdaptedModel(module, resolve_targets(module, ""), found, adapter)


def load(network: AdaptedModel, **options: Any) -> None:
    given = {"trained": BOTH, "train_head": bool(network.initial_head), **options}
    network.load(random_adapters(network.modules, 3), {}, **given)


def tensors(result: LocalResult) -> Tensors:
    of_layers = {f"{m}.{n}": t for m, a in result.adapters.items() for n, t in a.tensors().items()}
    return {**of_layers, **result.head}


def assert_alike(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].device.type == "cpu"
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def test_tensors_of_two_devices_do_not_meet() -> None:
    here, there = torch.ones(3, 3, device=NAME), torch.ones(3, 3)
    for meet in (
        lambda: here + there,
        lambda: there @ here,
        lambda: torch.cat([here, there]),
        lambda: here.add_(there),
        lambda: torch.where(there > 0, here, here),
        lambda: here.masked_fill(there > 0, 0.0),
        lambda: here.index_select(0, torch.arange(2)),
        lambda: torch.randn(2, device=NAME, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="xpected"):
            meet()
    with pytest.raises(TypeError, match="convert pretend:0 device type tensor to numpy"):
        here.numpy()
    assert (here * torch.tensor(2.0) + 1).cpu().equal(3 * there)  # numbers may


def test_views_write_through_and_gradients_pass_them() -> None:
    start = torch.ones(4, device=NAME, requires_grad=True)
    doubled = start * 2
    doubled[1:3].mul_(3)
    doubled.sum().backward()
    assert start.grad is not None
    assert start.grad.cpu().tolist() == [2, 6, 6, 2]
    assert doubled.detach().view(2, 2).T[1].cpu().tolist() == [6, 2]


PLAIN: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "loraplus_lr_ratio": 4.0},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "proximal_mu": 0.3, "max_grad_norm": 0.5},
    "adabelief": {"optimizer": "adabelief"},
    "lora-pro": {"optimizer": "lora-pro"},
    "scaled": {"optimizer": "scaled"},
    "schedule": {"schedule": "cosine", "warmup_steps": 2},
}


@pytest.mark.parametrize(("way", "kind"), [*((way, "tiny") for way in PLAIN), ("adamw", "tiny-lm")])
def test_local_training(way: str, kind: str) -> None:
    results = []
    for device in ("cpu", NAME):
        network = model(device, kind)
        load(network, dropout=0.2, tail=RankRegularizer(start=1, weight=0.1))
        config = TrainConfig(batch_size=4, learning_rate=0.01, **PLAIN[way])
        data = DATA if kind == "tiny" else TEXTS
        results.append(train_local(network, data, np.arange(20), PAD, config, local_steps=6, seed=3))
    wanted, found = results
    assert_alike(tensors(found), tensors(wanted))
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)


def test_gradient_checkpointing() -> None:
    results = []
    for device in ("cpu", NAME):
        network = model(device, "tiny-lm")
        load(network, dropout=0.2)
        network.checkpointing = True
        config = TrainConfig(batch_size=4)
        results.append(train_local(network, TEXTS, np.arange(9), PAD, config, local_steps=3, seed=3))
    assert_alike(tensors(results[1]), tensors(results[0]))


PRIVATE: dict[str, dict[str, Any]] = {
    "hooks": {},
    "ghost": {"grad_sample_mode": "ghost"},
    "loop": {"grad_sample_mode": "loop"},
    "per-layer": {"clipping": "per-layer"},
    "micro": {"max_physical_batch_size": 2},
}


def private(network: AdaptedModel, data: Examples, *, release_loss: bool = False, **how: Any) -> LocalResult:
    of_step = mechanism(noise_multiplier=0.8, expected_batch_size=6, **how)
    config = TrainConfig(batch_size=6)
    return train_private(
        network, data, np.arange(30), PAD, config, local_steps=2, mechanism=of_step, seed=5,
        release_loss=release_loss,
    )  # fmt: skip


@pytest.mark.parametrize(("way", "kind"), [*((way, "tiny") for way in PRIVATE), ("ghost", "tiny-lm")])
def test_private_training(way: str, kind: str) -> None:
    results = []
    for device in ("cpu", NAME):
        network = model(device, kind)
        load(network, dropout=0.1)
        results.append(private(network, DATA if kind == "tiny" else TEXTS, release_loss=True, **PRIVATE[way]))
    assert_alike(tensors(results[1]), tensors(results[0]))
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)


def test_noise_of_the_operating_system() -> None:
    network = model(NAME)
    load(network)
    result = private(network, DATA, secure=True)
    assert all(tensor.isfinite().all() for tensor in tensors(result).values())


@pytest.mark.parametrize(
    ("private", "cored", "optimizer"),
    [(False, False, "adamw"), (False, True, "sgd"), (True, False, "sgd"), (True, True, "adamw")],
)
def test_cohorts(private: bool, cored: bool, optimizer: str) -> None:
    config = {"optimizer": "sgd", "momentum": 0.5, "proximal_mu": 0.2} if optimizer == "sgd" else {}
    results = []
    for device in ("cpu", NAME):
        network = model(device)
        members = [member(network, n, rank=2 + n, steps=3 + n % 2, cored=cored) for n in range(3)]
        members = privately(members) if private else members
        clipping = {} if private else {"max_grad_norm": 0.5}
        results.append(train_cohort(network, members, task(DATA, dropout=0.2, **clipping, **config)))
    for found, wanted in zip(*reversed(results), strict=True):
        assert_alike(tensors(found), tensors(wanted))
        assert found.loss == pytest.approx(wanted.loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["tiny", "tiny-lm"])
def test_evaluation(kind: str) -> None:
    outcomes = []
    for device in ("cpu", NAME):
        network = model(device, kind)
        load(network)
        outcomes.append(evaluate(network, DATA if kind == "tiny" else TEXTS, np.arange(40), PAD, 8))
    wanted, found = outcomes
    assert found.accuracy == wanted.accuracy
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-4)


def test_base_moves() -> None:
    moved = []
    for device in ("cpu", NAME):
        network = model(device)
        patches = [random_patch(network.modules, 2, seed) for seed in (1, 2)]
        digests = network.base_digests()
        network.base.move(patches)
        other = model(device)
        other.base.adopt(["a", "b"], {n: w.cpu() for n, w in network.base.moved_weights.items()})
        assert network.base.moved_digests() == other.base.moved_digests()
        moved.append({n: w.cpu() for n, w in network.base.moved_weights.items()})
        network.base.reset()
        assert network.base_digests() == digests
        assert all(network.base.pristine(name).device.type == "cpu" for name in network.modules)
    for name, weight in moved[0].items():
        assert torch.equal(moved[1][name], weight)


def test_what_starts_of_the_adapter_ask_of_the_base() -> None:
    """Gradients of its weights (LoRA-GA) and inputs of its layers (EVA), on the CPU."""
    asked = []
    for device in ("cpu", NAME):
        network, inputs = model(device), dict[str, torch.Tensor]()
        load(network, trained=frozenset())
        with network.base.gradients() as gradients, network.base.watched_inputs(inputs.__setitem__):
            found = gradients(batch_loss(network, load_batch(DATA, np.arange(6), PAD, network.device)))
        asked.append(
            {**found, **{f"input of {name}": given.detach().cpu() for name, given in inputs.items()}}
        )
    assert_alike(asked[1], asked[0])


def test_text_is_generated() -> None:
    texts = []
    for device in ("cpu", NAME):
        network = model(device, "tiny-lm")
        load(network)
        texts.append(continued(network.module, [5, 6, 7], 2))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("together", [False, True], ids=["one", "cohort"])
def test_no_step_of_ours_waits_for_the_device(together: bool) -> None:
    """One number a step is read by transformers, whether a mask masks anything; the loss at the end."""
    waits = []
    for steps in (1, 4):
        network = model(NAME)
        members = [member(network, n, steps=steps) for n in range(2)]
        load(network, dropout=0.1)
        before = SYNCHRONISATIONS.total()
        if together:
            train_cohort(network, members, task(DATA, dropout=0.1))
        else:
            config = TrainConfig(batch_size=4, max_grad_norm=1.0)
            train_local(network, DATA, np.arange(9), PAD, config, local_steps=steps, seed=3)
        waits.append(SYNCHRONISATIONS.total() - before)
    assert waits[1] - waits[0] == 3


RUNS: dict[str, dict[str, Any]] = {
    "one by one": {"engine.cohort-size": 1, "train.proximal-mu": 0.1, "lora.dropout": 0.1},
    "fedex": {"strategy.name": "fedex"},
    "fed-sb": {"strategy.name": "fed-sb"},
    "private": {"strategy.name": "ffa", "privacy.mode": "example", "engine.cohort-size": 1},
    "private cohort": {"strategy.name": "ffa", "privacy.mode": "example"},
    "vera": {"lora.method": "vera", "strategy.name": "ffa"},
    "language": {"task": "causal-lm", "model.name": "tiny-lm", "data.max-length": 16},
}


@pytest.mark.parametrize("way", RUNS)
def test_runs(way: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same adapter, base, losses and evaluation, exported for PEFT."""
    keys: dict[str, Any] = {
        "data.max-length": 24, "train.local-steps": 2, "num-server-rounds": 2, "engine.cohort-size": 4,
        "train.optimizer": "sgd", "train.learning-rate": 0.1,
    }  # fmt: skip
    found = {}
    for device in ("cpu", NAME):
        on(device, monkeypatch)
        fedlora.run(tiny_config(**{**keys, **RUNS[way]}), tmp_path / device)
        weights = load_file(tmp_path / device / "adapter" / "adapter_model.safetensors")
        lines = [json.loads(line) for line in (tmp_path / device / "rounds.jsonl").read_text().splitlines()]
        found[device] = weights, lines
    (wanted, lines), (weights, others) = found["cpu"], found[NAME]
    assert_alike(weights, wanted)
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``engine.device = "auto"`` takes this device."""
    for module in list(sys.modules.values()):
        if "pick_device" in vars(module) and module.__name__.startswith(("fedlora", "clients")):
            monkeypatch.setattr(module, "pick_device", lambda _: torch.device(device))
