"""The pretrained encoder and the rated sentences: fetched once, skipped where that is impossible."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from clients.evaluation import evaluate
from clients.training.train import train_local
from fedlora.assets.fetch import asset_path
from fedlora.config import EngineConfig, TrainConfig, from_flat
from fedlora.core.factors import AdapterSet, LoraFactors
from fedlora.core.init_drawn import fresh_adapters
from fedlora.data.examples import evaluation_subset
from fedlora.errors import AssetError
from fedlora.models import build_model
from fedlora.server.directory import RunDirectory
from fedlora.simulation.ray_pool import RayPool
from fedlora.simulation.simulate import simulate, simulate_on
from tests.in_process import client_runtime

pytestmark = [pytest.mark.slow, pytest.mark.real]

KEYS: dict[str, Any] = {
    "num-server-rounds": 3,
    "seed": 7,
    "fraction-train": 0.5,
    "data.num-partitions": 8,
    "data.evaluate-examples": 40,
    "data.max-length": 16,
    "lora.ranks": "2,8,4",
    "strategy.name": "flora",
    "train.local-steps": 2,
    "train.batch-size": 4,
}


@pytest.fixture(scope="module", autouse=True)
def assets() -> Iterator[None]:
    """The user's own cache, with both assets in it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("FEDLORA_CACHE", raising=False)
        try:
            asset_path("minilm")
            asset_path("sentiment")
        except AssetError as error:
            pytest.skip(str(error))
        yield


def test_one_process_and_two_actors_end_on_the_same_adapter_which_peft_loads(tmp_path: Path) -> None:
    """Eight clients, mixed ranks, half of them a round, three rounds, a base that moves."""
    config = from_flat(KEYS)
    pool = RayPool(EngineConfig(num_actors=2, num_cpus=0.5))
    try:
        simulate_on(pool, config, RunDirectory(tmp_path / "two"))
    finally:
        pool.close()
    simulate(from_flat({**KEYS, "engine.name": "in-process"}), tmp_path / "one")
    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    directory = RunDirectory(tmp_path / "two", resume=True)
    checkpoint = directory.load_checkpoint()
    assert checkpoint is not None
    federated = build_model(config.model, 2, config.seed)
    for patch in checkpoint.state.base:
        for name, product in patch.products.items():
            federated.get_submodule(name).weight.data += product.dense()
    for name, tensor in checkpoint.state.head.items():
        federated.get_parameter(name).data.copy_(tensor)
    loaded = PeftModel.from_pretrained(
        build_model(config.model, 2, config.seed), tmp_path / "two" / "adapter"
    )
    batch = torch.randint(1000, 5000, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(batch)
    with torch.inference_mode():
        expected = federated(input_ids=batch, attention_mask=mask).logits
        given = loaded.eval()(input_ids=batch, attention_mask=mask).logits
    pristine = build_model(config.model, 2, config.seed)
    with torch.inference_mode():
        before = pristine(input_ids=batch, attention_mask=mask).logits
    assert (given - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 1e-3


def test_zeroing_the_trained_factors_lowers_the_accuracy() -> None:
    """What the adapter learnt is in the factors, not only in the head that was trained with them."""
    config = from_flat({**KEYS, "lora.ranks": "", "data.partitioner": "iid", "data.num-partitions": 1})
    runtime = client_runtime(config)
    adapters = fresh_adapters(runtime.model.modules, 8, 2.0, seed=1)
    train = TrainConfig(learning_rate=3e-3, batch_size=8)
    runtime.model.load(adapters, {}, trained=frozenset("AB"), train_head=True)
    result = train_local(
        runtime.model, runtime.data.train, runtime.data.indices(0), runtime.data.pad_token_id, train,
        local_steps=100, seed=1,
    )  # fmt: skip
    subset = evaluation_subset(runtime.data.test, 600)

    def accuracy(adapters: AdapterSet) -> float:
        runtime.model.load(adapters, result.head)
        return evaluate(runtime.model, runtime.data.test, subset, runtime.data.pad_token_id).accuracy

    zeroed = {n: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for n, f in result.adapters.items()}
    assert accuracy(result.adapters) > accuracy(zeroed) + 0.02
