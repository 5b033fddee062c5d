"""FLoRA: clients' adapters are stacked, so that the global update is their exact weighted sum.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024 (arXiv 2409.05976), Eq. 4 and Algorithm 1.

    W <- W + [B_1 .. B_m] [p_1 s_1 A_1; ..; p_m s_m A_m]

Every round each client starts a new adapter: A_k random from its own seed, B_k = 0. B = 0 is what
makes "its product" equal "its change", so the start is not optional. The stack goes into the base as
a patch of rank R = sum_k r_k; a client that was away receives every patch that it lacks.

Exact for any ranks and scalings. p_k and s_k enter A only (in both factors they would count twice);
the authors' code has one common scaling, here each s_k is folded in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.core.adapters import lora_set
from fedlora.core.base_patches import Patch
from fedlora.core.factors import LoraFactors, as_product
from fedlora.core.init_drawn import DRAWN, fresh_adapters
from fedlora.core.seeding import derive
from fedlora.core.state import Broadcast, ClientSpec, ModuleSpec, State, Template
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rule import Rule


@dataclass(frozen=True, kw_only=True)
class FLoRARule(Rule):
    """Stack everything into the base, start afresh."""

    facts: ClassVar[Facts] = Facts(
        name="flora",
        title="FLoRA",
        paper="Wang et al., NeurIPS 2024, arXiv 2409.05976",
        exact=True,
        mixed_ranks=True,
        updates_base=True,
        product_invariant=True,
        mean=False,
        stale="product",
        secure_sum=False,
        supported_inits=DRAWN,
        inits_why="draws a new A each round",
        up="r_k(o+i)",
        down="R(o+i) for each round missed",
        deviation="each client's own scaling is in its part of the stack; the released code has one for all",
    )

    @property
    def needs_all_directions(self) -> str:
        return "starts each round from a new adapter, which has no spectrum"

    def init(self, template: Template, seed: int) -> State:
        """The state before round 1; a given adapter is the first patch, as clients start from B = 0."""
        state = super().init(template, seed)
        adapters = lora_set(state.adapters)
        given = {name: as_product(f) for name, f in adapters.items() if f.B.any()}
        empty = {name: _emptied(f) for name, f in adapters.items()}
        return replace(state, adapters=empty, base=(*state.base, Patch(given)) if given else state.base)

    def broadcast(self, state: State, client: ClientSpec) -> Broadcast:
        seed = derive(state.seed, "fresh-adapter", state.round + 1, client.partition_id)
        modules = {
            name: ModuleSpec(out_features=f.out_features, in_features=f.in_features)
            for name, f in lora_set(state.adapters).items()
        }
        adapters = fresh_adapters(modules, client.rank, client.scaling, seed, self.init_a)
        return replace(super().broadcast(state, client), adapters=adapters, fresh_seed=seed)

    def merge(self, layer: Layer) -> Merged:
        return Merged(layer.start, into_base=layer.target if layer.target.left.any() else None)


def _emptied(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(factors.A, torch.zeros_like(factors.B), factors.scaling)
