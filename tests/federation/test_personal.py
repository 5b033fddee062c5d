"""What clients keep to themselves ends in adapters of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import load_peft_weights

from clients.store import OWN
from fedlora.config import from_flat
from fedlora.core.factors import LoraFactors
from fedlora.core.peft_keys import to_peft
from fedlora.core.state import ClientSpec, State
from fedlora.errors import ConfigError
from fedlora.server.export import kept_by, mean_model, model_of
from fedlora.server.validate import check
from fedlora.simulation.simulate import simulate
from tests.conftest import tiny_config


def factors(seed: int, rank: int = 2, scaling: float = 2.0) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, 5, generator=g), torch.randn(4, rank, generator=g), scaling)


def test_a_personal_b_meets_the_shared_a_at_the_clients_scaling() -> None:
    state = State(round=1, adapters={"x": factors(0)}, head={"h": torch.ones(2)})
    mine = factors(1)
    client = ClientSpec(partition_id=0, rank=2, scaling=0.5)
    model = model_of(state, to_peft({"x": mine}, {}, {"B"}), client)
    expected = 0.5 * mine.B @ state.adapters["x"].A
    torch.testing.assert_close(model.adapters["x"].delta(), expected)
    head_only = model_of(state, to_peft({}, {"h": torch.zeros(2)}), client)
    torch.testing.assert_close(head_only.adapters["x"].delta(), state.adapters["x"].delta())
    assert not head_only.head["h"].any()


def test_the_mean_weighs_clients_and_leaves_out_who_never_trained() -> None:
    state = State(round=1, adapters={"x": factors(0)}, head={})
    one, two = factors(1), factors(2)
    own = {0: to_peft({"x": one}, {}, {"B"}), 3: to_peft({"x": two}, {}, {"B"})}
    mean = mean_model(state, own, {0: 1.0, 3: 3.0}).adapters["x"]
    torch.testing.assert_close(mean.B, 0.25 * one.B + 0.75 * two.B)
    assert mean.A is state.adapters["x"].A


@pytest.mark.parametrize("name", ["fedsa", "local-only"])
def test_a_run_leaves_an_adapter_for_each_client(name: str, tmp_path: Path, cache: Path) -> None:
    """FedSA: one A for all, a B for each, and their mean in ``adapter/``; local-only: nothing shared."""
    config = tiny_config(**{"strategy.name": name, "num-server-rounds": 2})
    simulate(config, tmp_path / "run")
    folders = sorted((tmp_path / "run" / "adapters").iterdir())
    assert [folder.name for folder in folders] == [f"client-{k}" for k in range(4)]
    found = [load_peft_weights(str(folder), device="cpu") for folder in folders]
    shared = load_peft_weights(str(tmp_path / "run" / "adapter"), device="cpu")
    for key in (key for key in shared if ".lora_" in key):
        alike = all(torch.equal(f[key], found[0][key]) for f in found)
        assert alike == (name == "fedsa" and ".lora_A." in key), key
        if name == "fedsa" and ".lora_B." in key:
            low, high = torch.stack([f[key] for f in found]).aminmax(dim=0)
            assert ((shared[key] >= low - 1e-6) & (shared[key] <= high + 1e-6)).all()
    stores = next((tmp_path / "run" / "clients").iterdir())
    assert sorted(kept_by(stores, range(4), 2, OWN)) == [0, 1, 2, 3]


@pytest.mark.parametrize("keys", [{"model.head": "local"}, {"strategy.name": "fedsa"}])
def test_private_clients_measure_nothing_for_the_server_unless_they_may(keys: dict[str, str]) -> None:
    """What a client measures on its own domains tells which these are."""
    private = {**keys, "privacy.mode": "example"}
    with pytest.raises(ConfigError, match=r"privacy\.release-metrics = false: .*which domains they hold"):
        check(from_flat(private))
    check(from_flat({**private, "privacy.release-metrics": True}))
    check(from_flat(keys))
