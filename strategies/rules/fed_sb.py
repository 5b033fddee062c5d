"""Fed-SB: A and B are frozen, only an r x r core R between them is trained and averaged.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", arXiv 2502.15436; the start is that of LoRA-SB, arXiv 2411.19557.

    W = W_0 + s B R A,    R' = sum_k p_k (s_k / s) R_k

with orthonormal columns of B (o, r) and rows of A (r, i). Exact: the product is linear in the one trained
factor. r^2 numbers travel; B and A travel once. All that the adapter can ever become lies in the span of B
and A, so they decide what can be learnt (``subspace``):

* ``random``: both drawn from the run's seed, R = 0. The default, because it needs no further data, costs
  nobody's privacy and trains R alone from round 1. Not the paper's: nothing in it knows the task, so that a
  small r reaches less.
* ``private``: found by training, in place of the paper's gradient. Round 1 trains B from 0 on an orthonormal
  A: its mean spans the update's columns. The server makes B orthonormal, ``B A = Q (Q^T B A)``, and round 2
  trains A. The server then takes ``U S V^T = SVD(s B A)``: B = U, R = S / s, A = V^T, and from round 3 on R
  is trained. Both refactorisations keep the product, and are post-processing; under DP-SGD the two rounds
  are charged as any other, so the stated epsilon covers B and A. They ship r*o and r*i numbers.
* ``principal``, ``ldu``, ``cosine``: singular vectors or triangular factors of W_0, or drawn cosines, R = 0
  (`strategies.rules.core_bases`). No data is looked at.
* ``public``: as the paper, from G, the loss's gradient at W_0 on a few examples, which must be public here
  (``data.public``): ``dW_1 = -eta sign(G)``, B = U_r, R = S_r / s, A = V_r^T of its SVD. The model starts at
  W_0 plus the best rank-r approximation of that first step.

R is (r, r), or zero but for ``heads`` blocks of (r / h, r / h) on its diagonal, so that r^2 / h numbers
travel: the sum of heads of Ravan (Raje et al., arXiv 2506.05568), ``sum_h B_h R_h A_h``, whose trained scale
of each head is in R_h here, as what its server averages is their product. With ``core = "diagonal"`` each
direction is a head of its own: r numbers, SVFit's under ``principal``, LoLDU's under ``ldu``. Blocks are as
exact as a dense core: the product stays linear in what is trained.

Deviations. The authors' private runs take G from the clients' pooled training data, neither clipped nor
noised, so that their epsilon does not cover B and A; here ``public`` never sees a client's example. Their
delta is one over the number of batches, here it is ``privacy.target-delta``. They average R uniformly, here
with p_k; their SVD is randomised, here exact. Their eta is the learning rate over the number of (warm-up)
steps, here an option. Their s is 1; here R can become the same with any s, but its gradients are s times
theirs, so that a learning rate of the paper holds at alpha = r (a step of the product is s times as long with
Adam, s^2 times with SGD).

A given adapter that is not empty is where a run starts: its SVD gives B, R and A (``private``: as it is). So
``init_a = "pissa"`` gives the principal directions of W_0; what is drawn says nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.adapters import as_lora
from fedlora.core.decompositions import outside, svd
from fedlora.core.factors import LoraFactors, Product, Tensors, as_product, check_same_modules
from fedlora.core.init_drawn import INIT_A
from fedlora.core.parallel import parallel_map
from fedlora.core.seeding import torch_stream
from fedlora.core.state import State, Template
from fedlora.errors import ConfigError, NotApplicable
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.mean import MeanRule
from strategies.rules.core_bases import Basis, cosine, ldu, principal

Draw = Callable[[str], torch.Generator]
SUBSPACES = ("random", "private", "public", "principal", "ldu", "cosine")
CORES = ("dense", "diagonal")
OWN = ("principal", "ldu", "cosine")
"""Whose A and B are neither trained nor found in a given adapter."""
CORE = frozenset({"R"})
SKETCH = {1: frozenset({"B"}), 2: frozenset({"A"})}
"""What the first rounds of ``private`` train and ship."""


@dataclass(frozen=True, kw_only=True)
class FedSBRule(MeanRule):
    """A and B frozen, R averaged. ``facts`` are those of the default ``subspace``.

    Attributes:
        subspace: where A and B come from: ``random``, ``private``, ``public``, ``principal``, ``ldu`` or
            ``cosine``.
        core: ``dense``, or ``diagonal``: r numbers.
        heads: blocks on the diagonal of a dense core.
        public_examples: for ``public``, how many examples the gradient is the mean of; the paper's code
            takes 50 to 550.
        eta: for ``public``, the size of the first step in every entry of W; 1e-4 is the paper's learning
            rate.
    """

    subspace: str = "random"
    core: str = "dense"
    heads: int = 1
    public_examples: int = 50
    eta: float = 1e-4

    facts: ClassVar[Facts] = Facts(
        name="fed-sb",
        title="Fed-SB",
        paper="Singhal et al., arXiv 2502.15436",
        trained=CORE,
        uploaded=CORE,
        exact=True,
        mean=True,
        secure_sum=True,
        supported_inits=tuple(kind for kind in INIT_A if kind not in ("miss", "eva")),
        inits_why="finds an A of its own where the first product is empty",
        up="r^2 / heads",
        down="r^2 / heads (A and B once)",
        deviation="subspace = 'random' is not the paper's start, 'public' is; R's gradients scale with s = "
        "alpha / r, which is 1 in the paper, so its learning rates hold at alpha = r",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subspace not in SUBSPACES:
            accepted = ", ".join(SUBSPACES)
            raise ConfigError(f"strategy.options subspace = {self.subspace!r}: accepted are {accepted}")
        if self.core not in CORES:
            raise ConfigError(f"strategy.options core = {self.core!r}: accepted are {', '.join(CORES)}")
        if self.heads < 1 or (self.heads > 1 and self.core == "diagonal"):
            wanted = (
                "must be >= 1"
                if self.heads < 1
                else "a diagonal core has one for each direction, leave it out"
            )
            raise ConfigError(f"strategy.options heads = {self.heads}: {wanted}")
        if self.subspace in OWN and self.init_a != "kaiming":
            raise NotApplicable(
                f"strategy.init-a = {self.init_a!r}: fed-sb with subspace = {self.subspace!r} has its own A"
            )
        if self.public_examples < 1:
            raise ConfigError(f"strategy.options public-examples = {self.public_examples}: must be >= 1")
        if not (math.isfinite(self.eta) and self.eta > 0):
            raise ConfigError(f"strategy.options eta = {self.eta}: must be finite and > 0")

    def trained(self, server_round: int) -> frozenset[str]:
        return SKETCH.get(server_round, CORE) if self.subspace == "private" else CORE

    def shipped(self, server_round: int) -> frozenset[str]:
        return self.trained(server_round)

    @property
    def needs_all_layers(self) -> str:
        return "finds A and B of every layer in its first two rounds" if self.subspace == "private" else ""

    @property
    def coordinates_stay(self) -> bool:
        return self.subspace != "private"

    @property
    def gradient_examples(self) -> int:
        return self.public_examples if self.subspace == "public" else 0

    @property
    def base_weights(self) -> bool:
        return self.subspace in ("principal", "ldu")

    @property
    def core_in_blocks(self) -> bool:
        return self.heads > 1 or self.core == "diagonal"

    def init(self, template: Template, seed: int) -> State:
        """The state before round 1; see the module.

        Raises:
            ConfigError: ``public`` without gradients on public examples, ``principal`` or ``ldu`` without the
                base weights, or a rank that ``heads`` does not divide.
            FactorShapeError: gradients of other modules.
        """
        first: Tensors = {}
        if template.rank % self.heads:
            raise ConfigError(
                f"strategy.options heads = {self.heads}: must divide lora.rank = {template.rank}"
            )
        if self.base_weights and template.weight is None:
            raise ConfigError(
                f"strategy.options subspace = {self.subspace!r}: needs the base weights, use fedlora's "
                "ServerApp"
            )
        if self.gradient_examples:
            if template.gradients is None:
                raise ConfigError(
                    "data.public = '': must name public examples for fed-sb with subspace = 'public'"
                )
            check_same_modules(template.modules, template.gradients, "the gradient")
            first = {name: -self.eta * G.sign() for name, G in template.gradients.items()}
        state = super().init(template, seed)

        def start(name: str) -> LoraFactors:
            given = as_lora(state.adapters[name]).folded()
            if self.subspace in OWN and not given.B.any():
                B, A = self._basis(template, name, drawn(seed, name))
                return self._cored(LoraFactors(A, B, given.scaling, A.new_zeros(given.rank, given.rank)))
            return self._start(given, first.get(name), drawn(seed, name))

        starts = parallel_map(start, state.adapters)
        return replace(state, adapters=dict(zip(state.adapters, starts, strict=True)))

    def settle(self, layer: Layer, adapter: LoraFactors, memory: Tensors) -> Merged:
        """R as it is; after a sketch of ``private`` the product in its new basis, and no momentum."""
        if self.trained(layer.server_round) == CORE:
            return Merged(adapter, memory=memory)
        cored = with_core(as_product(adapter), adapter.rank, adapter.scaling, drawn(layer.seed, layer.name))
        return Merged(cored.folded() if layer.server_round == 1 else self._cored(cored))

    def _basis(self, template: Template, name: str, draw: Draw) -> Basis:
        if self.subspace == "cosine":
            spec = template.modules[name]
            return cosine(spec.out_features, spec.in_features, template.rank, draw)
        assert template.weight is not None  # `init` has refused
        return (principal if self.subspace == "principal" else ldu)(template.weight(name), template.rank)

    def _cored(self, dense: LoraFactors) -> LoraFactors:
        """The same with R in blocks, where it is: an R (r, r) that is zero elsewhere."""
        heads = dense.rank if self.core == "diagonal" else self.heads
        if heads == 1 or dense.R is None:
            return dense
        size = dense.rank // heads
        R = torch.stack([dense.R[k : k + size, k : k + size] for k in range(0, dense.rank, size)])
        return dense.replaced({"R": R})

    def _start(self, given: LoraFactors, step: Tensor | None, draw: Draw) -> LoraFactors:
        """One layer's start, from the given adapter, or from dW_1 or nothing where that is empty."""
        if self.subspace == "private":
            if given.B.any():
                return given
            A = completed(given.A.new_zeros(given.in_features, 0), given.rank, draw("A")).T
            return LoraFactors(A.contiguous(), given.B, given.scaling)
        wanted = as_product(given)
        if step is not None and not given.B.any():
            wanted = Product(step, torch.eye(given.in_features, dtype=step.dtype))
        return self._cored(with_core(wanted, given.rank, given.scaling, draw))


def with_core(p: Product, rank: int, scaling: float, draw: Draw) -> LoraFactors:
    """The best rank-``rank`` approximation of ``p`` as ``s B R A``: B = U_r, R = S_r / s, A = V_r^T.

    Where ``p`` has fewer directions, the others of B and A are drawn and R is zero there.
    """
    U, S, Vh = svd(p)
    q = min(rank, int((torch.finfo(S.dtype).eps * S[0] < S).sum()))
    R = S.new_zeros(rank, rank)
    R[:q, :q] = torch.diag(S[:q] / scaling)
    A = completed(Vh[:q].T, rank, draw("A")).T
    return LoraFactors(A.contiguous(), completed(U[:, :q], rank, draw("B")), scaling, R)


def completed(basis: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns (n, k), and drawn ones at right angles to them: (n, rank), zeros beyond n."""
    more = outside(basis.T, rank - basis.shape[1], generator)
    return torch.cat([basis, more.T], dim=1)


def drawn(seed: int, module: str) -> Draw:
    """The streams of a layer's drawn directions, ``A`` and ``B``."""
    return lambda side: torch_stream(seed, "fed-sb", side, module)
