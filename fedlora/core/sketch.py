"""Sketches of products that clients can add up, and the sum of the products out of the sum of the sketches.

With T (out, in) = sum_k p_k s_k B_k A_k and matrices drawn from the run's seed, alike for all clients,

    columns  T O^T   (out, q)        core    F T G^T  (2q, 2q)
    rows     U T     (q, in)         probes  H T      (p, in)

are linear in T, and a client makes its own from its factors. Q and P are orthonormal bases of the columns and
of the rows:

    T' = Q (F Q)^+ core ((G P)^+)^T P^T,       E ||H (T - T')||^2 = (p / out) ||T - T'||^2

Tropp, Yurtsever, Udell and Cevher, "Streaming low-rank matrix approximation with an application to scientific
simulation", SIAM J. Sci. Comput. 41(4), 2019 (arXiv 1902.08651). T' = T where the rank of T is at most q;
beyond, the probes, which T' does not depend on, tell how much is lost. Where the sketches would be no smaller
than T, T itself is added up.

All four go in one exchange. A basis Q that the server makes of the sum of the columns and sends back, to be
answered by ``Q^T s_k B_k A_k``, would lose half as much at the same width (Halko, Martinsson and Tropp 2011),
but whoever vanishes between the two answers is in the first sum and not in the second: the difference is its
own update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.decompositions import truncate
from fedlora.core.factors import AdapterSet, LoraFactors, Product, Tensors, bounded, norm
from fedlora.core.seeding import torch_stream

PROBES = 4
"""Rows by which what is lost is measured."""
SPARE = 4
"""Columns beyond the rank that is to be caught: else the smallest directions drown in rounding."""
WHOLE, COLUMNS, ROWS, CORE, PROBED = "whole", "columns", "rows", "core", "probes"


@dataclass(frozen=True, slots=True)
class Sketch:
    """How the products of a round are sketched.

    Attributes:
        size: columns and rows of each sketch, q.
        seed: of the drawn matrices.
    """

    size: int
    seed: int

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        """The sketches of a layer by name, or the whole of it where that is not larger."""
        q = self.size
        shapes = {
            COLUMNS: (out_features, q), ROWS: (q, in_features), CORE: (2 * q, 2 * q),
            PROBED: (PROBES, in_features),
        }  # fmt: skip
        numbers = sum(rows * columns for rows, columns in shapes.values())
        whole = {WHOLE: (out_features, in_features)}
        return shapes if numbers < out_features * in_features else whole

    def start(self, factors: AdapterSet) -> Tensors:
        """The sketches of products that are zero, by layer and name."""
        shapes = {layer: self.shapes(*own.shape) for layer, own in factors.items()}
        return {_key(n, x): torch.zeros(shape) for n, own in shapes.items() for x, shape in own.items()}

    def sketches(self, factors: AdapterSet) -> Tensors:
        """The sketches of a client's products, by layer and name."""
        return {_key(n, x): t for n, own in factors.items() for x, t in self.of(n, own).items()}

    def products(self, factors: AdapterSet, summed: Tensors, rank: int) -> tuple[AdapterSet, float]:
        """The mean products as factors of scaling 1.

        Args:
            factors: any of the same layers.
            summed: the mean of all clients' `sketches`.
            rank: the most that a product can have; directions beyond it are rounding.

        Returns:
            B (out, r) and A (r, in) of each layer, float32, and which share of the norm of all products
            together is lost, by the probes.
        """
        found = {
            layer: self.product(layer, {x: summed[_key(layer, x)] for x in self.shapes(*own.shape)})
            for layer, own in factors.items()
        }
        lost = sum(missed for _, missed in found.values())
        kept = sum(norm(product) ** 2 for product, _ in found.values())
        means = {
            layer: truncate(product, min(rank, product.rank_bound, *factors[layer].shape), 1.0)
            for layer, (product, _) in found.items()
        }
        means = {n: LoraFactors(f.A.float(), f.B.float(), f.scaling) for n, f in means.items()}
        return means, math.sqrt(lost / (lost + kept)) if lost else 0.0

    # --- one layer --------------------------------------------------------------------------------------

    def of(self, layer: str, factors: LoraFactors) -> Tensors:
        """The sketches of a product ``s B A`` (out, in), by name."""
        plain = factors.folded()
        B, A = plain.scaling * plain.B.double(), plain.A.double()  # (out, r), (r, in)
        if WHOLE in self.shapes(*plain.shape):
            return {WHOLE: B @ A}
        left, right = self._drawn(layer, ROWS, B), self._drawn(layer, COLUMNS, A.T)
        core_left, core_right = self._drawn(layer, CORE, B), self._drawn(layer, "core-columns", A.T)
        return {
            COLUMNS: B @ (A @ right.T),
            ROWS: (left @ B) @ A,
            CORE: (core_left @ B) @ (core_right @ A.T).T,
            PROBED: (self._drawn(layer, PROBED, B) @ B) @ A,
        }

    def product(self, layer: str, summed: Tensors) -> tuple[Product, float]:
        """T' of a layer, and an estimate of ``||T - T'||^2``.

        Args:
            layer: its name.
            summed: the sum of the clients' sketches.
        """
        given = {name: tensor.double() for name, tensor in summed.items()}
        if WHOLE in given:
            whole = given[WHOLE]
            return bounded(Product(whole, torch.eye(whole.shape[1], dtype=whole.dtype))), 0.0
        Q, P = (torch.linalg.qr(basis).Q for basis in (given[COLUMNS], given[ROWS].T))  # (out, q), (in, q)
        F, G = self._drawn(layer, CORE, Q), self._drawn(layer, "core-columns", P)
        half = torch.linalg.lstsq(F @ Q, given[CORE]).solution  # (q, 2q)
        core = torch.linalg.lstsq(G @ P, half.T).solution.T  # (q, q)
        product = Product(Q, core @ P.T)
        missed = given[PROBED] - (self._drawn(layer, PROBED, Q) @ Q) @ product.right
        return product, float(missed.square().sum()) * len(Q) / PROBES

    def _drawn(self, layer: str, name: str, beside: Tensor) -> Tensor:
        """A matrix (.., n) of independent numbers of variance ``1 / n``, for n rows."""
        n = len(beside)
        rows = {CORE: 2 * self.size, "core-columns": 2 * self.size, PROBED: PROBES}.get(name, self.size)
        drawn: Tensor = torch.randn(
            rows, n, generator=torch_stream(self.seed, name, layer), dtype=torch.float64
        )
        return drawn / math.sqrt(n)


def _key(layer: str, name: str) -> str:
    """Under which no tensor of a head is known."""
    return f"sketch/{layer}/{name}"
