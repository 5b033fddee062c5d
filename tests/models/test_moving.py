"""The base moves by patches: the same bits for a client that was always there and for one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.core.base_patches import Patch
from fedlora.core.factors import LoraFactors, Product, as_product
from fedlora.core.init_drawn import fresh_adapters
from fedlora.errors import FactorShapeError, RunFailed
from fedlora.models import AdaptedModel
from fedlora.models.layers import oriented
from tests.models.samples import adapted, logits, random_adapters, random_patch, token_batch


def weights(model: AdaptedModel) -> dict[str, torch.Tensor]:
    """The base weights of the adapted layers as they are now."""
    return {name: _base_layer(model, name).weight.data for name in model.modules}


def _base_layer(model: AdaptedModel, name: str) -> torch.nn.Module:
    layer = model.module.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def patches(model: AdaptedModel, number: int = 4) -> list[Patch]:
    return [random_patch(model.modules, rank=5, seed=seed) for seed in range(number)]


def test_the_bits_do_not_depend_on_how_patches_arrive() -> None:
    models = [adapted() for _ in range(3)]
    chain = patches(models[0])
    models[0].base.move(chain)
    for version, patch in enumerate(chain):
        models[1].base.move([patch], since=version)
    models[2].base.move(chain[:1])
    models[2].load(random_adapters(models[2].modules, 4), {})
    models[2].base.move(chain[1:], since=1)
    expected = weights(models[0])
    for model in models[1:]:
        assert model.base.version == 4
        assert all(torch.equal(w, expected[name]) for name, w in weights(model).items())


def test_patches_are_multiplied_out_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    dense = Product.dense
    monkeypatch.setattr(Product, "dense", lambda p: threads.append(torch.get_num_threads()) or dense(p))
    model = adapted()
    torch.set_num_threads(2)
    try:
        model.base.move(patches(model))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(threads) == {1}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_patch_is_added_in_the_orientation_of_the_layer(kind: str, gpt2: Path) -> None:
    model = adapted(targets="intermediate.dense") if kind == "linear" else adapted(str(gpt2))
    expected = {name: w.clone() for name, w in weights(model).items()}
    chain = patches(model)
    for patch in chain:
        for name, product in patch.products.items():
            expected[name] = expected[name] + oriented(_base_layer(model, name), product.left @ product.right)
    model.base.move(chain)
    assert all(torch.equal(w, expected[name]) for name, w in weights(model).items())


def test_a_patch_in_the_base_computes_what_the_same_product_computes_as_an_adapter(gpt2: Path) -> None:
    for name in ("tiny", str(gpt2)):
        model = adapted(name)
        adapters = random_adapters(model.modules, 4)
        model.load(adapters, {})
        batch = token_batch(vocabulary=200)
        expected = logits(model.module, batch)
        model.load(fresh_adapters(model.modules, 4, 1.0, 0), {})
        model.base.move([Patch({n: as_product(f) for n, f in adapters.items()})])
        torch.testing.assert_close(logits(model.module, batch), expected, rtol=1e-4, atol=1e-5)


def test_pristine_weights_are_never_written() -> None:
    model = adapted()
    pristine = weights(model)
    copies = {name: w.clone() for name, w in pristine.items()}
    model.base.move(patches(model))
    moved = weights(model)
    for name, w in pristine.items():
        assert torch.equal(w, copies[name])
        assert moved[name].data_ptr() != w.data_ptr()
        assert not torch.equal(moved[name], w)
    model.base.reset()
    assert model.base.version == 0
    assert all(w.data_ptr() == pristine[name].data_ptr() for name, w in weights(model).items())
    model.base.move(patches(model))
    assert all(torch.equal(w, moved[name]) for name, w in weights(model).items())


def test_each_patch_is_applied_once() -> None:
    model = adapted()
    chain = patches(model)
    model.base.move(chain[:3])
    expected = {name: w.clone() for name, w in weights(model).items()}
    model.base.move(chain[:3])
    model.base.move(chain[1:3], since=1)
    assert model.base.version == 3
    assert all(torch.equal(w, expected[name]) for name, w in weights(model).items())


def test_a_gap_or_another_history_is_refused() -> None:
    model = adapted()
    chain = patches(model)
    model.base.move(chain[:2])
    with pytest.raises(RunFailed, match="base version 3 is needed to go on, this base has version 2"):
        model.base.move(chain[3:], since=3)
    with pytest.raises(RunFailed, match=r"base patch 2 is \w+, but \w+ is already in the weights"):
        model.base.move(chain[2:3], since=1)
    assert model.base.version == 2


@pytest.mark.parametrize("kind", ["foreign", "shape"])
def test_a_patch_that_does_not_fit_leaves_the_base_alone(kind: str) -> None:
    model = adapted()
    good = random_patch(model.modules, 2, 0)
    product = Product(torch.ones(3, 1), torch.ones(1, 3))
    last = list(model.modules)[-1]
    bad = Patch({**good.products, ("nowhere" if kind == "foreign" else last): product})
    before = weights(model)
    with pytest.raises(FactorShapeError):
        model.base.move([bad])
    assert model.base.version == 0
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())


def test_a_low_precision_base_keeps_what_it_cannot_show() -> None:
    """Additions below the resolution of bfloat16 add up in the float32 master."""
    model = AdaptedModel(adapted().module.to(torch.bfloat16), adapted().modules)
    name, spec = next(iter(model.modules.items()))
    before = weights(model)[name].float()
    size = float(before.abs().max()) * 2**-12
    tiny = Product(torch.full((spec.out_features, 1), size), torch.ones(1, spec.in_features))
    model.base.move([Patch({name: tiny})] * 64)
    after = weights(model)[name]
    assert after.dtype == torch.bfloat16
    expected = (before + 64 * size).to(torch.bfloat16)
    torch.testing.assert_close(after, expected, rtol=2**-7, atol=0)
    model.base.reset()
    assert torch.equal(weights(model)[name].float(), before)


def test_adapters_stay_separate_from_the_base() -> None:
    model = adapted()
    zero = {
        n: LoraFactors(f.A, torch.zeros_like(f.B), 1.0) for n, f in random_adapters(model.modules, 4).items()
    }
    model.load(zero, {})
    base = logits(model.module, token_batch())
    model.base.move(patches(model, 1))
    model.load(random_adapters(model.modules, 2), {})
    model.base.reset()
    model.load(zero, {})
    assert torch.equal(logits(model.module, token_batch()), base)
