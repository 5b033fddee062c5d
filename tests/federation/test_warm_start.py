"""``model.adapter``: a run goes on from a PEFT adapter, whoever wrote it, or refuses it in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from clients.runtime import ClientRuntime
from fedlora.config import RunConfig
from fedlora.core.sealed import read_sealed, sealed
from fedlora.core.state import State
from fedlora.errors import ConfigError, NotApplicable
from fedlora.models.build import build_model
from fedlora.server.build import assemble
from fedlora.server.identity import config_digest
from fedlora.server.inputs import inputs_digest
from fedlora.server.validate import check
from strategies.registry import RULES
from tests.conftest import tiny_config
from tests.federation.test_kinds import run
from tests.in_process import client_runtime
from tests.models.samples import logits, token_batch

TENSORS = "adapter_model.safetensors"


def begun(config: RunConfig) -> tuple[State, ClientRuntime]:
    """The state before round 1, as the server makes it."""
    runtime = client_runtime(config)
    strategy = assemble(
        check(config), config, runtime, range(2), simulation=True, packed=False, known_examples=lambda _: None
    )
    assert strategy.state is not None
    return strategy.state, runtime


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that a federation left."""
    path = tmp_path_factory.mktemp("trained")
    run(path, **{"num-server-rounds": 1, "train.learning-rate": 0.05})
    return path / "run" / "adapter"


@pytest.mark.parametrize("strategy", sorted(RULES))
def test_every_rule_starts_from_the_function_of_the_adapter(strategy: str, trained: Path) -> None:
    """FLoRA and FLoRIST with the product in the base, all others with the adapter's product in theirs."""
    config = tiny_config(**{"model.adapter": str(trained), "strategy.name": strategy, "engine.device": "cpu"})
    state, runtime = begun(config)
    runtime.load_state(state)
    found = logits(runtime.model.module, token_batch())
    tensors = load_file(trained / TENSORS)
    product = {
        name: 4.0
        * tensors[f"base_model.model.{name}.lora_B.weight"]
        @ tensors[f"base_model.model.{name}.lora_A.weight"]
        for name in state.adapters
    }
    assert all(part.any() for part in product.values())
    for name in state.adapters:
        assert torch.allclose(state.product(name).dense(), product[name], atol=1e-6), name
    assert len(state.base) == (strategy in ("flora", "florist"))
    fresh, other = begun(replace(config, model=replace(config.model, adapter="")))
    other.load_state(fresh)
    assert not torch.allclose(found, logits(other.model.module, token_batch()), atol=1e-4)


def test_a_run_goes_on_where_another_left_off(trained: Path, tmp_path: Path) -> None:
    """The model before round 1 is the adapter that was left, its head included."""
    config = tiny_config(
        **{"model.adapter": str(trained), "num-server-rounds": 1, "train.learning-rate": 1e-12}
    )
    done = run(
        tmp_path, **{"model.adapter": str(trained), "num-server-rounds": 1, "train.learning-rate": 1e-12}
    )
    before, after = load_file(trained / TENSORS), load_file(tmp_path / "run" / "adapter" / TENSORS)
    assert before.keys() == after.keys()
    assert any("classifier" in key for key in before)
    for key in before:
        assert torch.allclose(before[key], after[key], atol=1e-6), key
    measured = [json.loads((p / "result.json").read_text()) for p in (trained.parent, tmp_path / "run")]
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], abs=1e-5)
    card = json.loads((tmp_path / "run" / "adapter" / "fedlora.json").read_text())
    assert card["model"]["adapter"] == ""  # it is of the same base, whatever it started from
    assert inputs_digest(config, done.runtime) != inputs_digest(tiny_config(), client_runtime(tiny_config()))


@pytest.fixture(scope="module")
def stranger(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An adapter that PEFT wrote over the tiny language model, by somebody who has no fedlora."""

    def made(**keys: Any) -> Path:
        path = tmp_path_factory.mktemp("stranger")
        base = build_model(tiny_config(**{"model.name": "tiny-lm"}).model, 0, 1, "language-model")
        settings: dict[str, Any] = {
            "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False,
        } | keys  # fmt: skip
        get_peft_model(base, LoraConfig(**settings)).save_pretrained(path)
        fields = json.loads((path / "adapter_config.json").read_text())
        fields["base_model_name_or_path"] = "tiny-lm"
        (path / "adapter_config.json").write_text(json.dumps(fields))
        return path

    return made


LM: dict[str, Any] = {
    "model.name": "tiny-lm", "task": "causal-lm", "data.name": "sentiment",
    "lora.target-modules": "q_proj,v_proj", "engine.device": "cpu",
}  # fmt: skip


def test_an_adapter_of_peft_alone_is_taken(stranger: Callable[..., Path]) -> None:
    path = stranger()
    state, _ = begun(tiny_config(**{**LM, "model.adapter": str(path)}))
    tensors = load_file(path / TENSORS)
    for name, factors in state.adapters.items():
        assert torch.equal(factors.tensors()["A"], tensors[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(factors.tensors()["B"], tensors[f"base_model.model.{name}.lora_B.weight"])


@pytest.mark.parametrize(
    ("theirs", "mine", "line"),
    [
        ({"r": 2}, {}, r"has rank 2 in \S+, the run has lora.rank = 4"),
        ({"lora_alpha": 8}, {}, r"has scaling 2 in \S+, the run has 4 \(lora.alpha = 16\)"),
        ({"target_modules": ["q_proj"]}, {}, r"does not adapt \S+v_proj, the run does \(lora.target"),
        ({}, {"lora.target-modules": "q_proj"}, r"adapts \S+v_proj, the run does not \(lora.target"),
        ({"use_dora": True}, {}, r".*use_dora = true: only plain LoRA can be aggregated or started from"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(
    theirs: dict[str, Any], mine: dict[str, Any], line: str, stranger: Callable[..., Path]
) -> None:
    path = stranger(**theirs)
    with pytest.raises(ConfigError, match=rf"^model.adapter(:| = '{path}':) {line}") as caught:
        begun(tiny_config(**{**LM, **mine, "model.adapter": str(path)}))
    assert "\n" not in str(caught.value)


def edited(path: Path, copy: Path, **fields: Any) -> Path:
    shutil.copytree(path, copy)
    card = read_sealed(copy / "fedlora.json")
    (copy / "fedlora.json").write_text(json.dumps(sealed(card | fields)))
    return copy


def test_another_base_labels_or_head_are_named(
    trained: Path, stranger: Callable[..., Path], tmp_path: Path
) -> None:
    def refused(path: Path, line: str, **keys: Any) -> None:
        with pytest.raises(ConfigError, match=line):
            begun(tiny_config(**{"model.adapter": str(path), **keys}))

    path = stranger()
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    refused(path, "has base 'org/other', the run has 'tiny-lm'", **LM)
    other = edited(trained, tmp_path / "a", label_names=["a", "b"])
    refused(other, "has labels 'a, b', the run has '")
    other = edited(trained, tmp_path / "b", task="causal-lm")
    refused(other, "has task 'causal-lm', the run has 'classification'")
    refused(
        trained, "has a classifier.* of its own, which stays as it is in the run", **{"model.head": "freeze"}
    )
    refused(tmp_path / "nothing", r"^model.adapter: \S+nothing: no such directory")
    tensors = load_file(trained / TENSORS)
    broken = edited(trained, tmp_path / "c")
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, broken / TENSORS)
    refused(broken, "holds a NaN or an infinity")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"lora.method": "vera"}, "is of lora, the run has lora.method = 'vera'"),
        ({"strategy.init-a": "pissa"}, "brings its A, leave strategy.init-a = 'pissa' out"),
        (
            {"strategy.name": "fed-sb", "strategy.options": '{"subspace": "public"}', "data.public": "x"},
            "fed-sb starts from a gradient on public examples here",
        ),
        ({"lora.ranks": "2,4", "strategy.name": "flora"}, r"needs equal ranks, not \[2, 4\]"),
    ],
)
def test_other_starts_exclude_it(keys: dict[str, Any], line: str) -> None:
    if "lora.method" in keys:
        keys = keys | {"lora.alpha": 16.0}
    with pytest.raises(NotApplicable, match=rf"^model.adapter = 'x': {line}"):
        check(tiny_config(**{"model.adapter": "x", **keys}))


def test_runs_without_one_keep_their_digest() -> None:
    assert config_digest(tiny_config()) != config_digest(tiny_config(**{"model.adapter": "x"}))
