"""LoRA-FAIR: average A and B, then correct B so that B' A points where the true mean update points.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
ICCV 2025 (arXiv 2411.14961), the server problem for dB:

    A = sum_k p_k A_k,   B = sum_k p_k (s_k / s) B_k,   T = sum_k p_k (s_k / s) B_k A_k
    dB = argmin  1 - cos(T, (B + dB) A) + lam ||dB||_F^2,     A' = A,  B' = B + dB

Choices where the paper is silent or code differs:

* the similarity S is used as the dissimilarity 1 - cos, over the flattened layer;
* ``norm``: the paper prints the plain norm ||dB||_F, implementations square it. They differ: the plain one
  has a dead zone, dB = 0 wherever the cosine's gradient at 0 is no longer than lam;
* dB starts at zero (a random start with the paper's lam = 0.01 never forgets its noise);
* ``solver = "ridge"`` is not the paper's: ``||T - (B + dB) A||^2 + lam ||dB||^2`` in closed form, which minds
  the length of T, too. As lam -> 0, B' = T A^+;
* ``correct`` names the ablations of the paper: dA solves the same problem with the factors exchanged; of
  both, dB is found first and dA then against B', so that the cosine only rises.

How it is solved without the (out, in) matrix is in `strategies.rules.fair_solver`.

Not exact: only what T has in the row space of A can be repaired, ``cos <= ||T V|| / ||T||`` with V an
orthonormal basis of that; the rest is dropped. lam -> infinity is FedAvg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlora.core.factors import LoraFactors, Product, scale
from fedlora.errors import ConfigError
from strategies.facts import Facts
from strategies.layer import Layer, Merged, mean_a, mean_b
from strategies.rule import Rule
from strategies.rules.fair_solver import cosine_correction, ridge_correction

ACCEPTED = {"norm": ("squared", "plain"), "solver": ("cosine", "ridge"), "correct": ("B", "A", "both")}


@dataclass(frozen=True, kw_only=True)
class LoRAFAIRRule(Rule):
    """A averaged, B averaged and corrected, the remainder dropped.

    Attributes:
        lam: the paper's lambda, >= 0; larger keeps B' nearer to the plain average.
        norm: of the correction, ``squared`` or ``plain``.
        solver: ``cosine`` as in the paper, or ``ridge``, least squares.
        correct: ``B`` as in the paper, ``A``, or ``both``.
    """

    lam: float = 0.01
    norm: str = "squared"
    solver: str = "cosine"
    correct: str = "B"

    facts: ClassVar[Facts] = Facts(
        name="lora-fair",
        title="LoRA-FAIR",
        paper="Bian et al., ICCV 2025, arXiv 2411.14961",
        exact=False,
        mean=False,
        secure_sum=False,
        up="r(o+i)",
        down="r(o+i)",
        deviation="the penalty is squared, which the paper prints plain; the cosine is of the whole layer "
        "and dB starts at zero; no code of the authors could be had to verify it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ConfigError(f"strategy.options lam = {self.lam}: must be finite and >= 0")
        for key, accepted in ACCEPTED.items():
            if getattr(self, key) not in accepted:
                given = getattr(self, key)
                raise ConfigError(f"strategy.options {key} = {given!r}: accepted are {', '.join(accepted)}")
        if (self.solver, self.norm) == ("ridge", "plain"):
            raise ConfigError("strategy.options norm = 'plain': solver = 'ridge' accepts only squared")

    def merge(self, layer: Layer) -> Merged:
        s = layer.start.scaling
        A, B, T = mean_a(layer), mean_b(layer), scale(1.0 / s, layer.target)  # sum_k p_k s_k B_k A_k / s
        if self.correct != "A":
            B = B + self.correction(A, B, T)
        if self.correct != "B":
            A = A + self.correction(B.T, A.T, Product(T.right.T, T.left.T)).T
        return Merged(LoraFactors(A, B, s))

    def correction(self, A: Tensor, B: Tensor, T: Product) -> Tensor:
        """The dB (out, r) for the averages A (r, in), B (out, r) and the mean product T."""
        if self.solver == "ridge":
            return ridge_correction(A, B, T, self.lam)
        return cosine_correction(A, B, T, self.lam, squared=self.norm == "squared")
