"""What is exported is what was trained, read back by PEFT itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedlora.config import ModelConfig
from fedlora.core.base_patches import Patch
from fedlora.core.factors import Product, add, as_product, norm, scale
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import State
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel, AdapterCard, build_model
from fedlora.models.export import exactly, global_adapters, load_adapter, save_adapter
from tests.models.samples import adapted, logits, random_adapters, random_patch, token_batch

CASES = ("plain", "rslora", "flora", "everything", "one-layer-moved", "full-rank", "nothing")


def state_of(case: str, model: AdaptedModel) -> State:
    """A state as rules leave it; ``model`` only names the layers."""
    modules = model.modules
    head = {
        name: torch.randn(t.shape, generator=torch.Generator().manual_seed(3))
        for name, t in model.initial_head.items()
    }
    trained, fresh = random_adapters(modules, 4, 2.0), fresh_adapters(modules, 4, 2.0, 0)
    some = dict(list(modules.items())[:1])
    adapters, base = {
        "plain": (trained, ()),
        "rslora": (random_adapters(modules, 4, 16 / 4**0.5), ()),
        "flora": (fresh, tuple(random_patch(modules, 6, s) for s in range(2))),
        "everything": (trained, tuple(random_patch(modules, 5, s) for s in range(2))),
        "one-layer-moved": (trained, (random_patch(some, 5, 0),)),
        "full-rank": (trained, tuple(random_patch(modules, 20, s) for s in range(3))),
        "nothing": (
            fresh,
            (Patch({n: scale(0.0, p) for n, p in random_patch(modules, 2, 0).products.items()}),),
        ),
    }[case]
    return State(round=3, adapters=adapters, head=head, base=base)


def card_of(name: str, pooling: str = "mean") -> AdapterCard:
    model = ModelConfig(name=name, pooling=pooling)
    return AdapterCard(model=model, label_names=("no", "yes"), max_length=32, seed=7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("kind", "pooling"), [("tiny", "mean"), ("tiny", "model"), ("gpt2", "mean"), ("gpt2", "model")]
)
def test_peft_computes_the_federated_model(
    case: str, kind: str, pooling: str, gpt2: Path, tmp_path: Path
) -> None:
    name = "tiny" if kind == "tiny" else str(gpt2)
    federated = adapted(name, pooling, seed=7)
    state = state_of(case, federated)
    federated.base.move(state.base)
    federated.load(state.adapters, state.head)
    save_adapter(tmp_path / "adapter", state, {}, card_of(name, pooling), model=federated)
    exported = PeftModel.from_pretrained(
        build_model(ModelConfig(name=name, pooling=pooling), 2, 0), tmp_path / "adapter"
    )
    batch = token_batch(vocabulary=200)
    ours = logits(federated.module, batch)
    torch.testing.assert_close(logits(exported.eval(), batch), ours, rtol=1e-4, atol=1e-4)
    reloaded, card = load_adapter(tmp_path / "adapter")
    assert card == card_of(name, pooling)
    torch.testing.assert_close(logits(reloaded, batch), ours, rtol=1e-4, atol=1e-4)


def test_an_adapter_over_a_resting_base_is_exported_bit_for_bit(tmp_path: Path) -> None:
    model = adapted()
    state = state_of("plain", model)
    save_adapter(tmp_path / "adapter", state, {}, card_of("tiny"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, factors in state.adapters.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], factors.A)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], factors.B)
    assert torch.equal(tensors["base_model.model.classifier.bias"], state.head["classifier.bias"])


@pytest.mark.parametrize(
    ("case", "ranks"), [("flora", 12), ("everything", 14), ("full-rank", 32), ("nothing", 1)]
)
def test_the_exported_rank_is_as_small_as_the_product_allows(case: str, ranks: int) -> None:
    model = adapted()
    state = state_of(case, model)
    merged = global_adapters(state)
    assert {f.rank for f in merged.values()} == {ranks}
    for name, factors in merged.items():
        wanted = add(*(p.products[name] for p in state.base), as_product(state.adapters[name]))
        missed = norm(
            add(Product(wanted.left.double(), wanted.right.double()), scale(-1.0, as_product(factors)))
        )
        assert missed <= 1e-5 * max(norm(wanted), 1e-9)


def test_unequal_ranks_become_patterns(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(tmp_path / "adapter", state_of("one-layer-moved", model), {}, card_of("tiny"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    _, *rest = model.modules
    assert config["r"] == 9
    assert config["rank_pattern"] == dict.fromkeys(map(exactly, rest), 4)
    assert config["alpha_pattern"] == dict.fromkeys(map(exactly, rest), 8.0)
    assert config["target_modules"] == sorted(model.modules)
    assert config["modules_to_save"] == ["classifier"]


def test_a_frozen_head_is_exported_too(tmp_path: Path) -> None:
    model = adapted(seed=7)
    state = replace(state_of("plain", model), head={})
    save_adapter(tmp_path / "adapter", state, model.initial_head, card_of("tiny"))
    model.load(state.adapters, {})
    other_seed = build_model(ModelConfig(name="tiny"), 2, seed=8)
    exported = PeftModel.from_pretrained(other_seed, tmp_path / "adapter")
    torch.testing.assert_close(logits(exported, token_batch()), logits(model.module, token_batch()))


def test_an_export_replaces_the_last_one_and_holds_no_pickle(tmp_path: Path) -> None:
    model = adapted()
    target = tmp_path / "runs" / "adapter"
    target.mkdir(parents=True)
    (target / "stale.txt").write_text("old")
    save_adapter(target, state_of("plain", model), {}, card_of("tiny"))
    assert {f.name for f in target.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedlora.json",
    }
    assert [f.name for f in target.parent.iterdir()] == ["adapter"]


def test_a_failing_export_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    target = tmp_path / "adapter"
    save_adapter(target, state_of("plain", model), {}, card_of("tiny"))
    before = {f.name: f.read_bytes() for f in target.iterdir()}
    monkeypatch.setattr(AdapterCard, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(target, state_of("flora", model), {}, card_of("tiny"))
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{}",
        "not json",
        '{"model": {"name": "tiny"}, "label_names": ["a", "b"], "max_length": 8, "seed": 0}',
    ],
)
def test_a_directory_that_is_no_adapter_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "fedlora.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        load_adapter(tmp_path)
    assert "\n" not in str(error.value)
