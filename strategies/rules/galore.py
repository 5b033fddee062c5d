"""GaLore in a federation: the weight is trained in r directions, which are others after each round.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024
(arXiv 2403.03507), trains a weight in the r directions of a projector P that is changed every so many steps.
While P stands, that is LoRA with a frozen factor: ``W + P R`` with R from zero. Here P stands for a round,
and the trained side changes with the rounds, since an update ``P R`` holds no direction outside P:

    odd t:   A frozen, B from 0,   B' = sum_k p_k (s_k / s) B_k,   W <- W + s B' A
    even t:  B frozen, A from 0,   A' = sum_k p_k A_k,             W <- W + s B A'
    U S V^T = SVD of what joined W;   frozen next is B = P(U S) after odd t, A = P(V S)^T after even t

with P a choice of r orthonormal columns:

    aggregate   U, V: a step of a subspace iteration in each round, r more directions after two of them
    dct         the r columns of the cosine basis (DCT-II) with the most energy of U S, V S, as the SVD-free
                optimiser chooses them (arXiv 2505.17967)
    random      uniform

Exact: what is frozen is one matrix for all, and all of the product joins W. Private training keeps its
noise linear in the product, and the projector is made of what the server has. Clients apply patches.

Costs: r*o or r*i up in turn; down the factors and a patch of rank r for each round that a client missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.decompositions import compact_svd, outside
from fedlora.core.factors import LoraFactors, Product, Tensors, bounded
from fedlora.errors import unknown_name
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rules.rolora import RoLoRARule
from strategies.server_optimizer import FIRST


@dataclass(frozen=True, kw_only=True)
class GaLoreRule(RoLoRARule):
    """One factor trained from zero and averaged, its product into the base, its directions frozen next.

    Attributes:
        projector: which directions are frozen, a key of `PROJECTORS`.

    Raises:
        ConfigError: an unknown projector.
    """

    projector: str = "aggregate"

    facts: ClassVar[Facts] = replace(
        RoLoRARule.facts,
        name="galore",
        title="GaLore",
        paper="after Zhao et al., ICML 2024, arXiv 2403.03507",
        any_kind=False,
        updates_base=True,
        rotates_basis=True,
        stale="an update lies in directions that are frozen for its own round",
        down="2r(o+i)",
        deviation="the paper projects one side, by the gradient, and takes no turns; the optimiser begins "
        "anew in each round; FedGaLore's mean of second moments (arXiv 2602.01746) is not here",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projector not in PROJECTORS:
            raise unknown_name("strategy.options projector", self.projector, PROJECTORS)

    @property
    def needs_all_layers(self) -> str:
        return "begins at zero with what the round trains, and a layer that rested would miss its turn"

    def settle(self, layer: Layer, adapter: LoraFactors, memory: Tensors) -> Merged:
        moved = Product(adapter.B, adapter.scaling * adapter.A)
        U, S, Vh = compact_svd(moved)
        project, drawn = PROJECTORS[self.projector], layer.generator("projector")
        A, B = torch.zeros_like(adapter.A), torch.zeros_like(adapter.B)
        if "B" in self.trained(layer.server_round):
            B = project((U * S).T, adapter.rank, drawn).T.contiguous()
        else:
            A = project(S[:, None] * Vh, adapter.rank, drawn)
        after = LoraFactors(A, B, adapter.scaling)
        return Merged(after, into_base=bounded(moved), memory=_turned(memory, adapter, after))


def _turned(memory: Tensors, before: LoraFactors, after: LoraFactors) -> Tensors:
    """Momentum of the factor that trains next, in the new directions: ``B^T (m_B A)`` or ``(B m_A) A^T``."""
    if f"{FIRST}/B" in memory:
        return {f"{FIRST}/A": (after.B.T @ memory[f"{FIRST}/B"]) @ before.A}
    if f"{FIRST}/A" in memory:
        return {f"{FIRST}/B": before.B @ (memory[f"{FIRST}/A"] @ after.A.T)}
    return memory


def _leading(rows: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The given directions (q, n), at unit length, and as many drawn ones as are missing: (rank, n)."""
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.cat([unit, outside(unit, rank - len(unit), generator)])


def _cosines(rows: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The rank cosines of n places that hold most of the rows' (q, n) energy, slowest first: (rank, n)."""
    from scipy.fft import dct  # where it is needed: every client's process reads the rules

    n = rows.shape[1]
    energy = torch.from_numpy(dct(rows.double().numpy(), norm="ortho")).square().sum(dim=0)  # (n,)
    chosen = energy.argsort(descending=True, stable=True)[:rank].sort().values
    places = torch.arange(n, dtype=torch.float64) + 0.5
    basis = torch.cos(torch.pi / n * chosen[:, None].double() * places) * (2 / n) ** 0.5
    basis[chosen == 0] *= 0.5**0.5
    found = rows.new_zeros(rank, n)
    found[: len(basis)] = basis
    return found


def _random(rows: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Directions drawn uniformly, (rank, n)."""
    return outside(rows[:0], rank, generator)


PROJECTORS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "aggregate": _leading,
    "dct": _cosines,
    "random": _random,
}
"""Values of ``projector``: rows (q, n) of what was learned, rank, stream -> orthonormal rows (rank, n)."""
