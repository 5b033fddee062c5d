"""FedASK: FlexLoRA's model where the sketch is wide, with both factors of one length, and less where not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlora.core.factors import LoraFactors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import State
from fedlora.errors import ConfigError
from strategies.registry import make_rule
from tests.strategies.federations import effective, one_layer, relative

WIDE = one_layer(clients=4)
"""Four clients of rank 3 in a layer of 9 x 12: T has rank 9."""


def after(name: str, **options: int) -> State:
    rule = make_rule(name, options)
    before = WIDE.start(rule)
    return rule.aggregate(before, WIDE.updates(rule, before))[0]


def test_a_wide_sketch_is_flexloras_model_in_even_factors() -> None:
    for width in (0, 9, 40):
        found = after("fedask", sketch=width)
        assert relative(effective(found)["layer"], effective(after("flexlora"))["layer"]) < 1e-12
        factors = found.adapters["layer"]
        assert isinstance(factors, LoraFactors)
        lengths = torch.linalg.vector_norm(factors.A, dim=1), torch.linalg.vector_norm(factors.B, dim=0)
        assert torch.allclose(*lengths)
        assert torch.allclose(factors.A @ factors.A.T, torch.diag(lengths[0] ** 2), atol=1e-10)


def test_a_narrow_one_is_what_the_released_code_makes_in_two_sums() -> None:
    """A sum of sketches, and one of what clients have in its basis; alike in every round."""
    rule = make_rule("fedask", {"sketch": 4})
    before = WIDE.start(rule)
    updates = WIDE.updates(rule, before)
    clients = [(u.weight / 10, u.adapters["layer"].tensors()) for u in updates]
    omega = torch.randn(12, 4, generator=torch_stream(WIDE.seed, "sketch", "layer"), dtype=torch.float64)
    Y = sum(p * 2.0 * own["B"] @ (own["A"] @ omega) for p, own in clients)
    Q = torch.linalg.qr(Y).Q
    P = sum(p * 2.0 * own["A"].T @ (own["B"].T @ Q) for p, own in clients)
    U, S, Vh = torch.linalg.svd(P.T, full_matrices=False)
    expected = (Q @ (U[:, :3] * S[:3]) @ Vh[:3]).numpy()
    for done in (0, 3):
        state = replace(before, round=done)
        found, _ = rule.aggregate(state, updates)
        assert relative(effective(found)["layer"], expected) < 1e-12
    assert relative(effective(after("flexlora"))["layer"], expected) > 1e-3


def test_a_sketch_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.options sketch = -1: must be >= 0"):
        make_rule("fedask", {"sketch": -1})
