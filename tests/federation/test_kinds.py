"""Whole runs with other kinds of adapters, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig

from clients.training.train import train_local
from fedlora.adapters import TUNERS
from fedlora.config import from_flat
from fedlora.core.seeding import derive
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.models.export import load_adapter
from fedlora.server.federated_run import FederatedRun
from fedlora.server.validate import check
from strategies.registry import RULES
from tests.clients.cohort.test_runs import CohortGrid
from tests.conftest import tiny_config
from tests.in_process import federated
from tests.models.kinds import keys_of

pytestmark = pytest.mark.slow

VERA = {"lora.method": "vera", "num-server-rounds": 2}
PRIVATE = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0, "privacy.grad-sample-mode": "loop"}


def run(
    path: Path,
    *,
    resume: bool = False,
    together: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    **keys: Any,
) -> FederatedRun:
    config = tiny_config(**keys)
    federation = federated(config, path / "run", progress, resume=resume)
    federation.run(CohortGrid(federation.partitions, config, path / "clients", together=together))
    return federation


def values(federation: FederatedRun) -> dict[str, torch.Tensor]:
    state = federation.state
    own = {f"{m}.{n}": t for m, a in state.adapters.items() for n, t in a.tensors().items()}
    return own | {f"head.{name}": tensor for name, tensor in state.head.items()}


@pytest.mark.parametrize("method", TUNERS)
def test_one_client_alone_is_local_training(method: str, tmp_path: Path, cache: Path) -> None:
    """A federation of one client over one round is that client's training; the adapter left loads in PEFT."""
    done = run(tmp_path, **keys_of(method), **{"num-server-rounds": 1, "partitions": "2"})
    runtime, config = done.runtime, done.config
    model = runtime.model
    start = model.adapter.start()
    assert start is not None
    names = frozenset(name for adapter in start.values() for name in adapter.tensors())
    model.load(start, {}, trained=names, train_head=True)
    alone = train_local(
        model, runtime.data.train, runtime.data.indices(2), runtime.data.pad_token_id, config.train,
        local_steps=config.local_steps_of(2), seed=derive(config.seed, "client", 1, 2),
    )  # fmt: skip
    moved = 0.0
    for module, adapter in alone.adapters.items():
        for name, tensor in adapter.tensors().items():
            torch.testing.assert_close(done.state.adapters[module].tensors()[name], tensor, rtol=0, atol=1e-5)
            moved = max(moved, float((tensor - start[module].tensors()[name]).abs().max()))
    assert moved > 1e-3
    left = tmp_path / "run" / "adapter"
    assert type(PeftConfig.from_pretrained(left)) is TUNERS[method].config_type
    model.load(done.state.adapters, done.state.head)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    loaded, _ = load_adapter(left)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.module(**batch).logits, rtol=1e-4, atol=1e-5)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["lora_method"] == method
    assert isinstance(result["exact"], bool)


@pytest.mark.parametrize("keys", [{}, PRIVATE, {"strategy.name": "fedsa", "lora.method": "lokr"}])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    keys: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    whole = run(tmp_path / "whole", **{**VERA, **keys})
    run(tmp_path / "cut", **{**VERA, **keys, "num-server-rounds": 1})
    (tmp_path / "cut" / "run" / "result.json").unlink(missing_ok=True)
    again = run(tmp_path / "cut", resume=True, **{**VERA, **keys})
    assert values(again).keys() == values(whole).keys()
    for name, tensor in values(whole).items():
        assert torch.equal(values(again)[name], tensor), name


def test_orders_for_a_cohort_are_carried_out_one_by_one(tmp_path: Path, cache: Path) -> None:
    alone, together = (run(tmp_path / str(t), together=t, **VERA) for t in (False, True))
    for name, tensor in values(alone).items():
        assert torch.equal(values(together)[name], tensor), name


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.robust": "median"},
        {"strategy.server-optimizer": "fedadam"},
        {"privacy.mode": "client", "privacy.noise-multiplier": 1.0},
        {"wire-dtype": "float16"},
        {"strategy.name": "rolora"},
        {"strategy.name": "turns"},
        {"strategy.name": "local-only"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_what_needs_tensors_by_name_alone_takes_them(
    keys: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    done = run(tmp_path, **VERA, **keys)
    start = done.runtime.model.adapter.start()
    assert start is not None
    shipped = keys.get("strategy.name") != "local-only"
    after = {m: a.tensors()["vera_lambda_b"] for m, a in done.state.adapters.items()}
    assert any(not torch.equal(t, start[m].tensors()["vera_lambda_b"]) for m, t in after.items()) == shipped
    exact = {"strategy.robust": False, "strategy.server-optimizer": False}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    by_turns = keys.get("strategy.name") in ("rolora", "turns")
    assert result["exact"] == (by_turns and exact.keys().isdisjoint(keys))


def test_round_trips_carry_only_what_is_trained(tmp_path: Path, cache: Path) -> None:
    """Two layers of VeRA: up lambda_b and lambda_d, 36 numbers a layer, and the head."""
    done = run(tmp_path, **VERA, **{"strategy.name": "rolora", "model.head": "freeze"})
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    adapters = done.state.adapters.values()
    sizes = {
        part: 4 * sum(a.tensors()[name].numel() for a in adapters)
        for part, name in (("b", "vera_lambda_b"), ("d", "vera_lambda_d"))
    }
    assert [r["bytes_up"] for r in rounds] == [4 * sizes["b"], 4 * sizes["d"]]


@pytest.mark.parametrize("name", ["rolora", "turns"])
def test_four_factors_are_exact_one_at_a_time_alone(name: str, tmp_path: Path, cache: Path) -> None:
    """LoHa by RoLoRA trains three of its factors at once."""
    keys = {"strategy.name": name, "model.head": "freeze", "num-server-rounds": 4}
    done = run(tmp_path, **{**keys_of("loha"), **keys})
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exact"] == (name == "turns")
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    up = [json.loads(line)["bytes_up"] for line in lines]
    numbers = dict.fromkeys(("hada_w2_b", "hada_w1_a", "hada_w1_b", "hada_w2_a"), 0)
    for adapter in done.state.adapters.values():
        for tensor, values in adapter.tensors().items():
            numbers[tensor] += values.numel()
    first, *rest = (4 * 4 * count for count in numbers.values())
    assert up == ([first, *rest] if name == "turns" else [first, sum(rest)] * 2)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"strategy.name": "flora"}, r"flora reads the product of A and B, which lora alone has \(able: "),
        ({"strategy.init-a": "orthonormal"}, "makes the A of lora"),
        (
            {"client-groups": '[{"partitions": "0", "rank": 2}]'},
            "rank and alpha of a group are of lora alone",
        ),
        ({"train.loraplus-lr-ratio": 4.0}, "is of lora's B"),
        ({"model.quantization": "4bit"}, "is for lora alone"),
        ({"train.optimizer": "lora-pro"}, "moves the A and B of lora"),
        ({"privacy.mode": "example"}, "Opacus sees lora alone, use 'loop'"),
        ({"lora.ranks": "2,4"}, r"lora\.ranks = '2,4': is of lora alone"),
    ],
)
def test_what_only_lora_has_is_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises((ConfigError, NotApplicable), match=line) as error:
        check(from_flat({"lora.method": "vera", **keys}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rolora", "fedsa"])
def test_a_rule_of_two_parts_refuses_a_kind_that_has_one(name: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(
        NotApplicable, match=f"'{name}': tells two parts of an adapter apart, fourierft has one"
    ):
        run(tmp_path, **{**keys_of("fourierft"), "strategy.name": name})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_private_step_is_rehearsed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise RunFailed("privacy self-test: wrong on this model")

    monkeypatch.setattr("clients.rehearsal.check_steps", wrong)
    with pytest.raises(ConfigError, match=r"model\.name = 'tiny': privacy self-test: wrong on this model"):
        run(tmp_path, **VERA, **PRIVATE, **{"model.head": "freeze"})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_an_optimiser_of_matrices_alone_is_refused_before_a_round(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer = 'torch.optim:Muon': cannot be made"):
        run(tmp_path, **VERA, **{"train.optimizer": "torch.optim:Muon", "model.head": "freeze"})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_every_rule_that_reads_products_refuses_other_kinds() -> None:
    for name, rule in RULES.items():
        if not rule.facts.any_kind:
            with pytest.raises(NotApplicable, match="reads the product of A and B"):
                check(from_flat({"lora.method": "ia3", "strategy.name": name}))


def test_what_peft_refuses_is_one_line(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.method = 'c3a': PEFT refuses it here, ") as error:
        run(tmp_path, **{"lora.method": "c3a", "lora.rank": 8, "lora.method-options": '{"block_size": 7}'})
    assert "\n" not in str(error.value)
