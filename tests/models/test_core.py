"""A core between PEFT's two layers: the weight that it means, its gradients, and what is left of it after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from fedlora.adapters.lora import CoredOutput
from fedlora.config import ModelConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import State
from fedlora.errors import FactorShapeError
from fedlora.models import AdaptedModel, AdapterCard, build_model
from fedlora.models.export import save_adapter
from fedlora.models.layers import oriented
from tests.models.samples import (
    adapted,
    cored_adapters,
    dense_core,
    logits,
    random_adapters,
    random_patch,
    token_batch,
)

KINDS = ("linear", "conv1d")
HEADS = (1, 2, 4)
"""Of a core of rank 4: dense, in two blocks, diagonal."""
CORE = frozenset("R")


def model_of(kind: str, gpt2: Path) -> AdaptedModel:
    """Layers that are not square, of either type."""
    return adapted("tiny", targets="intermediate.dense,query") if kind == "linear" else adapted(str(gpt2))


def base_of(kind: str, gpt2: Path) -> torch.nn.Module:
    return build_model(ModelConfig(name="tiny" if kind == "linear" else str(gpt2)), 2, 0)


def gradients(model: AdaptedModel) -> dict[str, torch.Tensor]:
    with model.training() as trained:
        model.module(**token_batch(vocabulary=200)).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in trained.factors.items() if p.grad is not None}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_is_that_of_the_weight_with_s_b_r_a_added(kind: str, heads: int, gpt2: Path) -> None:
    model = model_of(kind, gpt2)
    adapters = cored_adapters(model.modules, rank=4, heads=heads)
    model.load(adapters, {})
    merged = base_of(kind, gpt2)
    for name, f in adapters.items():
        assert f.R is not None
        layer = merged.get_submodule(name)
        layer.weight.data = layer.weight.data + oriented(layer, f.scaling * (f.B @ dense_core(f.R) @ f.A))
    batch = token_batch(vocabulary=200)
    torch.testing.assert_close(logits(model.module, batch), logits(merged, batch), rtol=1e-4, atol=1e-5)
    model.load(random_adapters(model.modules, rank=4), {})  # the same A and B without the core
    assert not torch.allclose(logits(model.module, batch), logits(merged, batch), atol=1e-3)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_core_is_trained_and_its_gradient_is_that_of_the_dense_weight(
    kind: str, heads: int, gpt2: Path
) -> None:
    """dL/dR = s B^T (dL/dW) A^T, where R is not zero by its shape."""
    model = model_of(kind, gpt2)
    adapters = cored_adapters(model.modules, rank=4, heads=heads)
    model.load(adapters, {}, trained=CORE)
    found = gradients(model)
    assert set(found) == {f"{name}.R" for name in model.modules}
    assert sum(p.requires_grad for p in model.module.parameters()) == len(found)
    batch = token_batch(vocabulary=200)
    with model.base.gradients() as gradients_of:
        dense = gradients_of(model.module(**batch).logits.square().sum())
    for name, f in adapters.items():
        whole = f.scaling * f.B.T @ dense[name] @ f.A.T
        shaped = dense_core(torch.ones_like(found[f"{name}.R"]))
        wanted = whole * shaped
        torch.testing.assert_close(
            dense_core(found[f"{name}.R"]), wanted, rtol=1e-3, atol=1e-5 * float(wanted.norm())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_base_gradients_are_the_slope_of_the_loss_and_leave_no_trace(kind: str, gpt2: Path) -> None:
    """Along a random change of all layers, by a central difference in float64."""
    model = model_of(kind, gpt2)
    model.load(fresh_adapters(model.modules, 2, 1.0, 0), {})
    model.module.double()
    batch, step = token_batch(vocabulary=200), 1e-5
    with model.base.gradients() as gradients_of:
        found = gradients_of(model.module(**batch).logits.square().sum())
    assert {n: t.shape for n, t in found.items()} == {
        n: (m.out_features, m.in_features) for n, m in model.modules.items()
    }
    patch = random_patch(model.modules, rank=2, seed=0)
    values = []
    for sign in (1.0, -2.0):
        for name, product in patch.products.items():
            layer = model.module.get_submodule(name).base_layer
            layer.weight.data += sign * step * oriented(layer, product.dense().double())
        values.append(float(logits(model.module, batch).square().sum()))
    slope = sum(float((found[n] * p.dense()).sum()) for n, p in patch.products.items())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


def test_a_model_with_and_without_a_core_in_turn_equals_fresh_models() -> None:
    resident = adapted()
    turns = [(4, 1), (4, 0), (2, 1), (4, 4), (4, 2), (4, 1), (4, 0)]
    for seed, (rank, heads) in enumerate(turns):
        adapters = random_adapters(resident.modules, rank, 2.0, seed)
        if heads:
            adapters = cored_adapters(resident.modules, rank, 2.0, seed, heads)
        trained = CORE if heads else frozenset("AB")
        results = []
        for model in (resident, adapted()):
            model.load(adapters, {}, trained=trained)
            results.append((logits(model.module, token_batch()), gradients(model), model.read()[0]))
            assert {id(p) for p in model.module.parameters() if p.requires_grad} == {
                id(p) for p in model.trainable().all
            }
        (ours, our_gradients, read), (fresh, fresh_gradients, _) = results
        assert torch.equal(ours, fresh)
        assert our_gradients.keys() == fresh_gradients.keys()
        assert all(torch.equal(g, fresh_gradients[name]) for name, g in our_gradients.items())
        for name, factors in adapters.items():
            got = read[name].tensors()
            assert got.keys() == factors.tensors().keys()
            assert all(torch.equal(got[x], t) for x, t in factors.tensors().items())


def test_a_core_draws_nothing_and_peft_merges_it() -> None:
    model = adapted()
    adapters = cored_adapters(model.modules, 3)
    before = torch.get_rng_state()
    model.load(adapters, {})
    assert torch.equal(before, torch.get_rng_state())
    for name, factors in adapters.items():
        layer = model.module.get_submodule(name)
        assert isinstance(layer.lora_B[layer.active_adapters[0]], CoredOutput)
        delta = layer.get_delta_weight(layer.active_adapters[0])
        torch.testing.assert_close(delta, factors.delta(), rtol=1e-5, atol=1e-6)


def test_a_core_in_some_layers_only_is_refused() -> None:
    model = adapted()
    plain, cored = random_adapters(model.modules, 4), cored_adapters(model.modules, 4)
    first = next(iter(model.modules))
    with pytest.raises(FactorShapeError, match="a core in all layers or in none"):
        model.load({**plain, first: cored[first]}, {})
    blocks = cored_adapters(model.modules, 4, heads=2)
    with pytest.raises(
        FactorShapeError, match=r"one shape of core in all layers, this one has \[\(2, 2, 2\), \(4, 4\)"
    ):
        model.load({**cored, first: blocks[first]}, {})


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_a_plain_adapter_with_the_same_logits(
    kind: str, heads: int, gpt2: Path, tmp_path: Path
) -> None:
    model = model_of(kind, gpt2)
    name = "tiny" if kind == "linear" else str(gpt2)
    state = State(
        round=1, adapters=cored_adapters(model.modules, 4, 0.7, heads=heads), head=model.initial_head
    )
    model.load(state.adapters, state.head)
    card = AdapterCard(model=ModelConfig(name=name), label_names=("no", "yes"), max_length=32, seed=0)
    save_adapter(tmp_path / "adapter", state, {}, card, model=model)
    exported = PeftModel.from_pretrained(base_of(kind, gpt2), tmp_path / "adapter").eval()
    batch = token_batch(vocabulary=200)
    torch.testing.assert_close(logits(exported, batch), logits(model.module, batch), rtol=1e-4, atol=1e-5)
