"""PiSSA, OLoRA, LoRA-GA: the same function, PEFT's numbers, updates that count from the initial product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga

from fedlora.config import LoraConfig, RunConfig, StrategyConfig
from fedlora.core.factors import LoraFactors
from fedlora.core.init_svd import KINDS, subtract_from_base
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, Template
from fedlora.errors import ConfigError
from fedlora.server.validate import check
from strategies.registry import make_rule
from tests.models.samples import adapted, logits, random_adapters, save_tiny_gpt2, token_batch

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_the_model_computes_what_it_computed_before(layer: str, kind: str, tmp_path: Path) -> None:
    name = "tiny" if layer == "linear" else str(save_tiny_gpt2(tmp_path / "gpt2"))
    model, batch = adapted(name), token_batch(200)
    state = make_rule("ffa", {"init_a": kind}).init(
        subtract_from_base(model.template(2, 4.0), model.base.pristine, kind), seed=0
    )
    model.load(random_adapters(model.modules, 2), {})
    empty = {n: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for n, f in state.adapters.items()}
    model.load(empty, {})
    before = logits(model.module, batch)
    model.load(state.adapters, {})
    assert (logits(model.module, batch) - before).abs().max() > 1e-3
    model.base.move(state.base)
    torch.testing.assert_close(logits(model.module, batch), before, rtol=1e-4, atol=1e-5)


@every_kind
def test_the_factors_are_pefts(kind: str) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(9, 7, bias=False))
    W = layer[0].weight.detach().clone()
    gradient = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    config = PeftLoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    config.init_lora_weights = kind.replace("-", "_")  # its type hint does not know lora_ga
    if kind == "lora-ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(
            layer, config, lambda: (layer(torch.eye(9, requires_grad=True)) * gradient.T).sum().backward()
        )
    theirs = get_peft_model(layer, config)
    spec = {"x": ModuleSpec(out_features=7, in_features=9)}
    template = subtract_from_base(
        Template(modules=spec, rank=3, scaling=2.0), lambda _: gradient if kind == "lora-ga" else W, kind
    )
    assert template.adapters is not None
    assert template.base is not None
    ours, lora = template.adapters["x"], theirs.base_model.model[0]
    for own, peft in ((ours.A, lora.lora_A), (ours.B, lora.lora_B)):  # up to the signs of directions
        torch.testing.assert_close(own.abs(), peft["default"].weight.abs(), rtol=1e-4, atol=1e-5)
    taken = template.base.products["x"].dense()
    torch.testing.assert_close(taken, -ours.delta(), rtol=1e-5, atol=1e-6)
    if kind != "lora-ga":  # there A and B have their signs from different directions, and so has B A
        torch.testing.assert_close(W + taken, lora.base_layer.weight, rtol=1e-4, atol=1e-5)


@every_kind
def test_without_the_base_weights_it_is_refused(kind: str) -> None:
    spec = {"x": ModuleSpec(out_features=7, in_features=9)}
    what = "public examples" if kind == "lora-ga" else "the base weights"
    with pytest.raises(ConfigError, match=f"strategy.init-a = '{kind}': needs {what}, use fedlora's"):
        make_rule("ffa", {"init_a": kind}).init(Template(modules=spec, rank=2, scaling=1.0), 0)


@every_kind
def test_a_round_in_which_nobody_moves_is_no_change(kind: str) -> None:
    """dW_k counts from the initial product: forgetting B_0 A_0 would add it once more."""
    W = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    spec = {"x": ModuleSpec(out_features=7, in_features=9)}
    for name in ("ffa", "fedavg", "fedsvd"):
        rule = make_rule(name, {"init_a": kind})
        before = rule.init(
            subtract_from_base(Template(modules=spec, rank=2, scaling=1.0), lambda _: W, kind), 0
        )
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


def test_lora_ga_needs_twice_the_rank() -> None:
    spec = {"x": ModuleSpec(out_features=7, in_features=9)}
    with pytest.raises(ConfigError, match=r"^lora\.rank = 4: .* takes 2 r directions .*\(7, 9\) has 7$"):
        subtract_from_base(Template(modules=spec, rank=4, scaling=1.0), lambda _: torch.ones(7, 9), "lora-ga")
