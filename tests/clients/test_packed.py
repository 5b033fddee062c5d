"""Frozen layers laid out for the processor: the same layers, in every pass, and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients.evaluation import evaluate
from clients.training.batched import train_cohort
from clients.training.train import train_local
from fedlora.models import AdaptedModel
from fedlora.models import packed_linear as packing
from fedlora.models.packed_linear import PackedLinear, frozen_forwards, packed, packed_base
from tests.clients.cohort.samples import DATA, member, model, task
from tests.clients.samples import PAD
from tests.models.samples import save_tiny_gpt2

BFLOAT16 = pytest.mark.skipif(
    not packing.has_onednn(torch.bfloat16), reason="this processor has no bfloat16 arithmetic"
)
PRECISIONS = [(torch.float32, 1e-5), pytest.param(torch.bfloat16, 0.02, marks=BFLOAT16)]


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_packed_layers_are_the_layers(precision: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """nn.Linear and Conv1D, forwards and backwards, float32 in and out."""
    for network in (
        model(torch.float32),
        model(torch.float32, name=str(save_tiny_gpt2(tmp_path)), targets="c_attn"),
    ):
        layers = network.frozen
        assert set(network.modules) < set(layers)
        for name, forward in frozen_forwards(network, precision).items():
            width = network.modules[name].in_features if name in network.modules else None
            layer = layers[name]
            width = width or min(layer.weight.shape[::-1], key=lambda n: _fits(layer, n))
            x = torch.randn(3, 5, width, requires_grad=True)
            y, wanted = forward(x), type(layer).forward(layer, x)
            assert type(y.grad_fn).__name__ == f"{PackedLinear.__name__}Backward"
            torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
            g = torch.randn_like(y)
            back = [torch.autograd.grad(out, x, g)[0] for out in (y, wanted)]
            torch.testing.assert_close(*back, rtol=tolerance, atol=tolerance)
            again = packed(network, name, precision)
            assert again is packed(network, name, precision)
            assert again.forth.dtype == precision


def _fits(layer: Any, width: int) -> int:
    try:
        type(layer).forward(layer, torch.zeros(1, width))
    except RuntimeError:
        return 1
    return 0


class Doubling(nn.Linear):
    """A kind of linear layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_other_kinds_of_linear_layers_compute_what_they_compute() -> None:
    network = model(torch.float32)
    layer, x = Doubling(32, 32), torch.randn(2, 3, 32)
    network.frozen = {"layer": layer}
    forward = frozen_forwards(network, torch.float32)["layer"]
    assert torch.equal(forward(x), layer(x))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The precision of every packed product that is made."""
    made: list[torch.dtype] = []
    real: Callable[..., torch.Tensor] = packing._product

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        made.append(weight.dtype)
        return real(x, weight, bias)

    monkeypatch.setattr(packing, "_product", counted)
    return made


def test_evaluation_is_packed_and_finds_the_same(products: list[torch.dtype]) -> None:
    """In float32, whatever the training is in."""
    network = model(torch.float32)
    network.precision = torch.bfloat16
    one = member(network, 0)
    network.load(one.adapters, one.head)
    plain = evaluate(network.module, DATA, np.arange(len(DATA)), PAD)
    assert products == []
    found = evaluate(network, DATA, np.arange(len(DATA)), PAD)
    assert set(products) == {torch.float32}
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-4)
    assert (found.right == plain.right).all()
    assert _overlaid(network) == []


@BFLOAT16
def test_bfloat16_is_that_of_the_products_alone(products: list[torch.dtype]) -> None:
    """One by one and in a cohort: what lies between them stays float32."""
    network, between = model(torch.float32), []
    network.precision = torch.bfloat16
    for module in network.module.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda *_: between.append(torch.is_autocast_enabled("cpu")))
    one = member(network, 0)
    network.load(one.adapters, one.head, trained=one.trained, train_head=True)
    with packed_base(network, network.precision):
        train_local(network, DATA, one.indices, PAD, task().config, local_steps=2, seed=1)
    assert network.precision == torch.bfloat16
    train_cohort(network, [one, member(network, 1)], task())
    assert set(products) == {torch.bfloat16}
    assert set(between) == {False}


def test_where_nothing_is_packed_the_precision_is_that_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, and for a base that is too large."""
    monkeypatch.setattr(packing, "MOST_BYTES", 0)
    network, seen = model(torch.float32), []
    network.precision = torch.bfloat16
    network.load(*_values(network))
    layer = network.frozen[next(iter(network.modules))]
    layer.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    with packed_base(network, network.precision), network.computing():
        assert _overlaid(network) == []
        network.module(
            **{name: torch.ones(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        )
    assert seen == [torch.bfloat16]


def test_the_model_is_as_it_was_also_after_a_failure() -> None:
    network = model(torch.float32)
    overlaid: list[str] = []

    def fail() -> None:
        with packed_base(network):
            overlaid.extend(_overlaid(network))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert len(overlaid) == len(network.frozen)
    assert _overlaid(network) == []


def _overlaid(network: AdaptedModel) -> list[str]:
    return [name for name, module in network.module.named_modules() if "forward" in vars(module)]


def _values(network: AdaptedModel) -> tuple[Any, Any]:
    one = member(network, 0)
    return one.adapters, one.head


def test_a_torch_without_the_operators_computes_by_itself_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, dense = model(torch.float32), "backbone.encoder.layer.0.intermediate.dense"
    monkeypatch.setattr(packing, "OPERATORS", (*packing.OPERATORS, "_no_such_operator"))
    layers = network.frozen
    x = torch.randn(2, 3, layers[dense].in_features)
    with packed_base(network):
        forward = frozen_forwards(network, torch.float32)[dense]
        assert torch.equal(forward(x), layers[dense](x))
        assert not any("forward" in vars(layer) for layer in layers.values())
    line = f"torch {torch.__version__} has no mkldnn._no_such_operator: frozen layers are not packed, slower"
    said = [r.message for r in caplog.records if "_no_such_operator" in r.message]
    assert said == [line]
