"""EVA: PEFT's directions, of what the layers really see, on the CPU in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import EvaConfig, get_eva_state_dict
from peft import LoraConfig as PeftLoraConfig

from fedlora.core.init_eva import InputMoments, most_varied
from fedlora.core.state import ModuleSpec, Template
from fedlora.errors import ConfigError
from tests.models.samples import adapted, logits, random_adapters, save_tiny_gpt2, token_batch

SPEC = {"x": ModuleSpec(out_features=5, in_features=6)}


def spread(rows: int = 200, seed: int = 0) -> torch.Tensor:
    """Inputs with well separated variances, far from the origin."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q
    return torch.randn(rows, 6, generator=g) * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.2]) @ mixed + 40


def test_the_directions_are_the_right_singular_vectors_of_the_centred_inputs() -> None:
    X, moments = spread(), InputMoments(SPEC)
    for part in X.split(37):
        moments.add("x", part)
    found = moments.directions("x", 3)
    wanted = torch.linalg.svd(X.double() - X.double().mean(dim=0)).Vh[:3]
    torch.testing.assert_close((found.double() * wanted).sum(dim=1).abs(), torch.ones(3, dtype=torch.float64))
    assert (found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all()
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=0, atol=1e-6)


def test_b_is_zero_and_too_few_inputs_are_refused() -> None:
    moments = InputMoments(SPEC)
    moments.add("x", spread(rows=3))
    template = Template(modules=SPEC, rank=2, scaling=0.5)
    factors = most_varied(template, moments)["x"]
    assert (factors.A.shape, factors.scaling, factors.B.shape) == ((2, 6), 0.5, (5, 2))
    assert not factors.B.any()
    with pytest.raises(ConfigError, match=r"^strategy\.init-examples: too few, x was given 3 inputs"):
        most_varied(Template(modules=SPEC, rank=3, scaling=0.5), moments)


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_the_directions_are_pefts(layer: str, tmp_path: Path) -> None:
    """PEFT's settle by rounds of an approximate SVD; it is shown one batch, so that both see the same."""
    name = "tiny" if layer == "linear" else str(save_tiny_gpt2(tmp_path / "gpt2"))
    model, rank, batch = adapted(name), 2, token_batch(200, (64, 12))
    config = PeftLoraConfig(
        r=rank,
        target_modules=list(model.modules),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1, tau=0.999),
    )
    mask = batch["attention_mask"].bool()
    moments = InputMoments(model.modules)
    with model.base.watched_inputs(lambda name, x: moments.add(name, x[mask])):
        logits(model.module, batch)
    theirs = get_eva_state_dict(model.module, [batch], config, show_progress_bar=False)
    assert set(theirs) == set(model.modules)
    for name, A in theirs.items():
        overlap = torch.linalg.svdvals(moments.directions(name, rank) @ A.float().T)
        assert overlap.min() > 0.95, name


def test_inputs_are_watched_under_an_adapter_too_and_no_hook_stays() -> None:
    model, batch, seen = adapted(), token_batch(200), []
    model.load(random_adapters(model.modules, 2), {})
    with model.base.watched_inputs(lambda name, x: seen.append((name, tuple(x.shape)))):
        logits(model.module, batch)
    assert seen == [(name, (5, 12, 32)) for name in model.modules]
    logits(model.module, batch)
    assert len(seen) == len(model.modules)
