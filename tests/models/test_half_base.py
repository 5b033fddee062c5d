"""``model.dtype``: a base in half precision under factors and a head in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from fedlora.config import ModelConfig
from fedlora.core.base_patches import Patch
from fedlora.core.factors import Product
from fedlora.errors import NotApplicable
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.server.validate import check
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values
from tests.models.samples import random_adapters, token_batch

Save = Callable[..., Path]
HALF = ("bfloat16", "float16")


def built(path: Path, dtype: str, **more: Any) -> AdaptedModel:
    module = build_model(ModelConfig(name=str(path), dtype=dtype, **more), 3, 0)
    return AdaptedModel(module, resolve_targets(module, ""))


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("dtype", HALF)
def test_the_base_is_held_in_half_and_what_is_trained_in_float32(
    dtype: str, pooling: str, saved: Save
) -> None:
    model = built(saved("roberta"), dtype, pooling=pooling)
    exact = built(saved("roberta"), "float32", pooling=pooling)
    for one in (model, exact):
        one.load(
            random_adapters(one.modules, 4),
            dict(exact.initial_head),
            trained=frozenset("AB"),
            train_head=True,
        )
    trained = model.trainable()
    assert {p.dtype for p in trained.all} == {torch.float32}
    others = {p.dtype for p in model.module.parameters() if not p.requires_grad}
    assert others == {getattr(torch, dtype)}
    batch = token_batch(60)
    found, wanted = model.module(**batch).logits, exact.module(**batch).logits
    assert found.dtype == torch.float32
    assert 0 < float((found - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
    found.square().mean().backward()
    assert all(
        torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in trained.all if p.grad is not None
    )


def test_auto_is_what_the_files_have(saved: Save, tmp_path: Path) -> None:
    network = tf.AutoModelForCausalLM.from_pretrained(saved("llama", "CausalLM"), dtype=torch.bfloat16)
    network.save_pretrained(tmp_path)
    for dtype, wanted in (("auto", torch.bfloat16), ("float32", torch.float32)):
        module = build_model(ModelConfig(name=str(tmp_path), dtype=dtype), 0, 0, "language-model")
        assert {p.dtype for p in module.parameters()} == {wanted}


@pytest.mark.parametrize("dtype", HALF)
def test_patches_add_up_in_float32_and_are_rounded_once(dtype: str, saved: Save) -> None:
    """A hundred steps that half precision would each lose are felt as their sum."""
    model = built(saved("roberta"), dtype)
    name = next(iter(model.modules))
    before = model.base.pristine(name)
    step = Product(torch.full((16, 1), 1e-4), torch.ones(1, 16))
    model.base.move([Patch({name: step})] * 100)
    after = model.base.moved_weights[name]
    torch.testing.assert_close(after, before + 0.01, rtol=0, atol=1e-5)
    seen = model.module.get_submodule(name).weight
    assert seen.dtype == getattr(torch, dtype)
    assert torch.equal(seen, after.to(seen.dtype))
    assert float((seen.float() - before).mean()) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("dtype", HALF)
def test_a_run_in_cohorts_and_its_export(dtype: str, saved: Save, tmp_path: Path, cache: Path) -> None:
    base = saved("llama", "CausalLM")
    rows = [{"text": " ".join(f"w{(n + k) % 60}" for k in range(6)), "who": str(n % 4)} for n in range(32)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = {
        "task": "causal-lm", "model.name": str(base), "model.dtype": dtype, "data.max-length": 16,
        "data.name": str(tmp_path / "words.jsonl"), "data.partition-by": "who", "num-server-rounds": 1,
    }  # fmt: skip
    alone, together = (run(tmp_path / str(t), together=t, **keys) for t in (False, True))
    moved = max(float(tensor.abs().max()) for name, tensor in values(alone).items() if name.endswith(".B"))
    for name, tensor in values(alone).items():
        assert tensor.dtype == torch.float32
        assert float((tensor - values(together)[name]).abs().max()) < 0.3 * moved
    network = tf.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    theirs = PeftModel.from_pretrained(network, tmp_path / "False" / "run" / "adapter").eval()
    alone.runtime.load_state(alone.state)
    batch = {"input_ids": torch.tensor([[5, 9, 12, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, alone.runtime.model.module(**batch).logits)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"privacy.mode": "example"}, "the self-test of private steps compares gradients"),
        ({"lora.method": "vera"}, "lora.method = 'vera' computes in float32"),
        ({"model.quantization": "4bit"}, "model.quantization = '4bit' says how the base is held"),
        ({"task": "image-classification", "data.name": "digits"}, "task image-classification computes in"),
    ],
)
def test_what_half_precision_cannot_have_is_refused(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(NotApplicable, match=rf"^model\.dtype = 'bfloat16': {why}.*, must be 'float32'$"):
        check(tiny_config(**{"model.dtype": "bfloat16"}, **keys))


def test_what_moves_the_base_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="small changes hardly at all"):
        check(tiny_config(**{"model.dtype": "bfloat16", "strategy.name": "flora"}))
