"""PiSSA: the same function, PEFT's own numbers, and an update that counts from the initial product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from fedlora.checks import check
from fedlora.config import LoraConfig, RunConfig, StrategyConfig
from fedlora.errors import ConfigError
from fedlora.factors import LoraFactors
from fedlora.models.pissa import principal
from fedlora.updates import ClientSpec, ClientUpdate, ModuleSpec, Template
from strategies.registry import make_rule
from tests.models.samples import adapted, logits, random_adapters, save_tiny_gpt2, token_batch


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_model_computes_what_it_computed_before(kind: str, tmp_path: Path) -> None:
    name = "tiny" if kind == "linear" else str(save_tiny_gpt2(tmp_path / "gpt2"))
    model, batch = adapted(name), token_batch(200)
    state = make_rule("ffa", {"init_a": "pissa"}).init(
        principal(model.template(2, 4.0), model.base_weight), seed=0
    )
    model.load(random_adapters(model.modules, 2), {})
    empty = {n: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for n, f in state.adapters.items()}
    model.load(empty, {})
    before = logits(model.module, batch)
    model.load(state.adapters, {})
    assert (logits(model.module, batch) - before).abs().max() > 1e-3
    model.move_base(state.base)
    torch.testing.assert_close(logits(model.module, batch), before, rtol=1e-4, atol=1e-5)


def test_the_factors_are_pefts() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(9, 7, bias=False))
    W = layer[0].weight.detach().clone()
    theirs = get_peft_model(
        layer, PeftLoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa")
    )
    spec = {"x": ModuleSpec(out_features=7, in_features=9)}
    template = principal(Template(modules=spec, rank=3, scaling=2.0), lambda _: W)
    assert template.adapters is not None
    assert template.base is not None
    ours, lora = template.adapters["x"], theirs.base_model.model[0]
    torch.testing.assert_close(ours.delta(), lora.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        W + template.base.products["x"].dense(), lora.base_layer.weight, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        ours.A.abs(), lora.lora_A["default"].weight.abs(), rtol=1e-4, atol=1e-5
    )  # up to signs


def test_without_the_base_weights_it_is_refused() -> None:
    spec = {"x": ModuleSpec(out_features=7, in_features=9)}
    with pytest.raises(ConfigError, match=r"strategy\.init-a = 'pissa': needs the base weights"):
        make_rule("ffa", {"init_a": "pissa"}).init(Template(modules=spec, rank=2, scaling=1.0), 0)


def test_a_round_in_which_nobody_moves_is_no_change() -> None:
    """dW_k counts from the initial product: forgetting B_0 A_0 would add it once more."""
    W = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    spec = {"x": ModuleSpec(out_features=7, in_features=9)}
    for name in ("ffa", "fedavg", "fedsvd"):
        rule = make_rule(name, {"init_a": "pissa"})
        before = rule.init(principal(Template(modules=spec, rank=2, scaling=1.0), lambda _: W), 0)
        client = ClientSpec(partition_id=0, rank=2, scaling=1.0)
        sent = rule.broadcast(before, client)
        update = ClientUpdate(partition_id=0, adapters=sent.adapters, head={}, weight=1.0)
        after, measured = rule.aggregate(before, [update])
        assert measured is not None
        assert measured.gap == 0.0
        torch.testing.assert_close(
            after.adapters["x"].delta(), before.adapters["x"].delta(), rtol=1e-5, atol=1e-6
        )


def test_mixed_ranks_are_refused() -> None:
    config = RunConfig(strategy=StrategyConfig(name="flexlora", init_a="pissa"), lora=LoraConfig(ranks="2,4"))
    with pytest.raises(ConfigError, match=r"strategy\.init-a = 'pissa': needs equal ranks"):
        check(config)
