"""MiSS: PEFT's own is FFA-LoRA on a tiled A, and comes out as a LoRA adapter that computes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import MissConfig, get_peft_model

from fedlora.config import ModelConfig
from fedlora.core.init_drawn import initial_a
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientSpec, ClientUpdate
from fedlora.models import AdapterCard, build_model
from fedlora.models.export import load_adapter, save_adapter
from strategies.registry import make_rule
from tests.models.samples import adapted, logits, token_batch


def test_the_tiles_cover_widths_that_the_rank_does_not_divide() -> None:
    A = initial_a("miss", 3, 7, torch_stream(0, "a"))
    assert A.tolist() == [[1, 0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1, 0]]


@pytest.mark.parametrize("rank", [4, 5])
def test_the_mean_of_pefts_matrices_is_what_ffa_exports(rank: int, tmp_path: Path) -> None:
    """Two clients with matrices D_k: PEFT's MiSS with the mean D, and our export opened by PEFT."""
    model, batch, rule = adapted(), token_batch(), make_rule("ffa", {"init_a": "miss"})
    state = rule.init(model.template(rank, 2.0), 0)
    g, weights, updates = torch.Generator().manual_seed(0), (1.0, 3.0), []
    for number, weight in enumerate(weights):
        sent = rule.broadcast(state, ClientSpec(partition_id=number, rank=rank, scaling=2.0))
        trained = {
            n: replace(f, B=torch.randn(f.B.shape, generator=g) * 0.2) for n, f in sent.adapters.items()
        }
        updates.append(
            ClientUpdate(partition_id=number, adapters=trained, head=dict(sent.head), weight=weight)
        )
    after, measured = rule.aggregate(state, updates)
    assert measured is not None
    assert measured.gap < 1e-6

    config = MissConfig(r=rank, target_modules=list(model.modules), init_weights=True)
    peft = get_peft_model(build_model(ModelConfig(name="tiny"), 2, 0), config).eval()
    for name in model.modules:
        D = sum(w / 4 * 2.0 * u.adapters[name].B.T for w, u in zip(weights, updates, strict=True))
        peft.get_submodule(f"base_model.model.{name}").miss_block["default"].data.copy_(D)
    card = AdapterCard(model=ModelConfig(name="tiny"), label_names=("a", "b"), max_length=32, seed=0)
    save_adapter(tmp_path / "adapter", after, model.initial_head, card)
    exported, _ = load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(exported, batch), logits(peft, batch), rtol=1e-4, atol=1e-5)
    assert (logits(exported, batch) - logits(adapted().module, batch)).abs().max() > 0.01
