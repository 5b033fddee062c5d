"""Declared facts of a rule; tests, tables and refusals are derived from them."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.core.factors import PLAIN
from fedlora.core.init_drawn import INIT_A


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts of a rule.

    Attributes:
        name: the key of ``strategy.name``.
        title: the name in the paper.
        paper: citation.
        trained: the factors that clients train, over all rounds; of another kind of adapter the tensors in
            these roles, see `NamedTensors.parts`.
        uploaded: those of them that come back, over all rounds.
        any_kind: the rule needs a mean of named tensors and no product of factors, so that it takes adapters
            of any kind (``lora.method``).
        by_client: clients are sent adapters of their own: there is no global model, and the global adapter is
            their mean.
        exact: the effective global weight after a round is W_before + sum_k p_k dW_k.
        mixed_ranks: clients may have different ranks.
        draws_ranks: which directions a client of a lower rank holds is drawn for it; without the draw its
            factors say nothing.
        chooses_directions: clients ship their largest changes alone, and put the others back.
        updates_base: the rule adds patches to the base weights.
        product_invariant: the global model depends on the s_k B_k A_k alone, not on how each is split.
        single_client_exact: the product of a client alone, at the global rank, becomes the global model.
        mean: the aggregate is a mean of what is shipped, so that client-level DP, a server optimiser
            and robust aggregation make sense.
        custom_weights: the rule weighs the factors itself; p_k counts for the head alone.
        first_round: what its first round from B = 0 amounts to, where that is another rule.
        rotates_basis: the server writes the global product in another basis after each round.
        secure_sum: the server only needs sums, of what is shipped or of products.
        sketched: it needs the mean product, and under secure sums gets it out of sketches, see
            `fedlora.core.sketch`.
        supported_inits: the values of ``init_a`` that the rule accepts.
        inits_why: why not the others, to follow the rule's name.
        up, down: numbers per layer, round and client; r rank, R sum of ranks, o out, i in.
        stale: what of an update counts that started from an older version: ``factors``, their change is added
            to those of now; ``product``, s_k B_k A_k goes into the base as it is; otherwise why none can.
        deviation: where it differs from the paper or the authors' code, and what of them could not be
            verified; one line, empty where nothing is known to differ.
    """

    name: str
    title: str
    paper: str
    trained: frozenset[str] = PLAIN
    uploaded: frozenset[str] = PLAIN
    any_kind: bool = False
    by_client: bool = False
    exact: bool
    mixed_ranks: bool = False
    draws_ranks: bool = False
    chooses_directions: bool = False
    updates_base: bool = False
    product_invariant: bool = False
    single_client_exact: bool = True
    mean: bool
    custom_weights: bool = False
    first_round: str = ""
    rotates_basis: bool = False
    secure_sum: bool
    sketched: bool = False
    supported_inits: tuple[str, ...] = INIT_A
    inits_why: str = ""
    up: str
    down: str
    stale: str = "an update is only right for the version that it started from"
    deviation: str = ""

    @property
    def personal(self) -> bool:
        """Clients keep a trained factor to themselves: there is no global model."""
        return not self.trained <= self.uploaded

    @property
    def own_models(self) -> bool:
        """Clients have models of their own, which they alone can measure."""
        return self.personal or self.by_client

    @property
    def global_adapter(self) -> bool:
        """Adapters are aggregated, and into a global one: else the diagnostics mean nothing."""
        return bool(self.uploaded) and not self.own_models

    @property
    def client_dp(self) -> bool:
        """Client-level DP is sound."""
        return self.mean
