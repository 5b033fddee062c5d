"""A rule: how the server turns the clients' adapters into the next global adapter.

Every rule answers one question for each adapted layer. The clients' mean asks for

    T = sum_k p_k s_k B_k A_k            (held as stacked factors, never as a matrix)

and the rule chooses (1) the adapter (A', B') that the clients start from next, and (2) the fate of
the remainder ``T - s B' A'``: dropped, or added to the base weight. `Rule.merge` is that choice;
everything around it (weights, order, head, diagnostics) is shared here.

Rules are pure: state in, state out, inputs untouched, no I/O, no global randomness. Layers are merged side
by side, each on one thread, so that the bits do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedlora.core.adapters import Adapters, LayerAdapter, as_lora, check_same_shapes, names_in, resized
from fedlora.core.base_patches import Patch
from fedlora.core.directions import all_parted, moving, rejoined, with_directions
from fedlora.core.factors import PLAIN, LoraFactors, Tensors, check_like, check_same_modules
from fedlora.core.init_drawn import FRESH, FROM_BASE, INIT_A, TAKEN_OUT, fresh_adapters
from fedlora.core.parallel import parallel_map
from fedlora.core.state import Broadcast, ClientSpec, ClientUpdate, State, Template
from fedlora.errors import ConfigError, NotApplicable, unknown_name
from strategies.allocation import All, Allocation
from strategies.checks import check_heads, normalised
from strategies.diagnostics import Diagnostics, LayerMeasure, measure, summarise
from strategies.facts import Facts
from strategies.layer import Center, Layer, Merged, Weighted, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules. A subclass declares ``facts`` and defines `merge`.

    Attributes:
        init_a: how the first A is made, ``kaiming``, ``orthonormal`` or ``miss``; ``pissa``, ``olora`` and
            ``lora-ga`` start both factors as a part of the base weight, which leaves the base; ``eva`` looks
            at inputs.
        allocation: which layers a round trains, or which directions of them.
        center: chooses whose updates count, and in a mean takes the middle of the clients' tensors.

    Raises:
        NotApplicable: an ``init_a`` or an allocation that the rule does not accept.
        ConfigError: an option outside what there is.
    """

    facts: ClassVar[Facts]
    penalises_tails: ClassVar[bool] = False
    """Whether clients' losses have a term of the rule's own, see `RankRegularizer`."""
    init_a: str = "kaiming"
    allocation: Allocation = field(default_factory=All)
    center: Center = field(default_factory=Center)

    def __post_init__(self) -> None:
        why = self.needs_all_layers or (self.needs_all_directions if self.allocation.parts else "")
        if why and self.allocation.name != "all":
            raise NotApplicable(f"strategy.allocation = {self.allocation.name!r}: {self.facts.name} {why}")
        if self.init_a not in INIT_A:
            raise unknown_name("strategy.init-a", self.init_a, INIT_A)
        if self.init_a not in self.facts.supported_inits:
            raise NotApplicable(
                f"strategy.init-a = {self.init_a!r}: {self.facts.name} {self.facts.inits_why}, "
                f"accepted are {', '.join(self.facts.supported_inits)}"
            )

    # --- what a rule may define -------------------------------------------------------------------

    def merge(self, layer: Layer) -> Merged:
        """One layer's aggregation."""
        raise NotImplementedError

    def weights(self, layer: Layer) -> Sequence[float]:
        """Weights of the clients in one layer, summing to 1: p_k."""
        return layer.weights

    def trained(self, server_round: int) -> frozenset[str]:
        """The factors that clients train in a round."""
        return self.facts.trained

    def shipped(self, server_round: int) -> frozenset[str]:
        """The factors that come back in a round."""
        return self.trained(server_round) & self.facts.uploaded

    def trained_names(self, layers: Iterable[LayerAdapter], server_round: int) -> frozenset[str]:
        """The names of these layers' tensors that a round trains."""
        return names_in(layers, self.trained(server_round))

    def shipped_names(self, layers: Iterable[LayerAdapter], server_round: int) -> frozenset[str]:
        """The names of these layers' tensors that come back in a round."""
        return names_in(layers, self.shipped(server_round))

    def choose(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """The updates that count, in partition order."""
        return self.center.choose(updates)

    def merge_head(
        self, state: State, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> tuple[Tensors, Tensors]:
        """The next head, and what is to be remembered of it: the mean with p_k, nothing."""
        head = dict(state.head)
        for name in check_heads(state.head, updates):
            head[name] = weighted_sum(weights, (update.head[name] for update in updates))
        return head, {}

    @property
    def needs_all_layers(self) -> str:
        """Reason that no layer can rest, to follow the rule's name; empty where any can."""
        return "" if self.facts.trained else "trains no layer"

    @property
    def needs_all_directions(self) -> str:
        """Reason that no direction of a layer can rest, to follow the rule's name; empty where any can."""
        if not self.facts.trained <= PLAIN:
            return "trains a core, in which directions are not apart"
        if self.facts.personal:
            return "leaves a factor at its clients, whose directions would be other ones in each round"
        return "chooses its clients' directions itself" if self.facts.draws_ranks else ""

    @property
    def upload(self) -> str:
        """The codec in which its updates are short, where the run names none, see `fedlora.wire.upload`."""
        return ""

    @property
    def plain(self) -> bool:
        """Whether nothing is composed with it that makes another function of what is averaged."""
        return self.center.is_mean

    @property
    def coordinates_stay(self) -> bool:
        """A number that a client ships means later what it means in this round, and counts in a mean."""
        return self.facts.mean and not self.facts.rotates_basis

    @property
    def gradient_examples(self) -> int:
        """Number of public examples that `init` needs the gradient of (`Template.gradients`); 0 for none."""
        return 0

    @property
    def base_weights(self) -> bool:
        """Whether `init` needs the base weights (`Template.weight`)."""
        return False

    @property
    def core_in_blocks(self) -> bool:
        """Whether its core is zero but for blocks, which travel alone."""
        return False

    # --- rounds -------------------------------------------------------------------------------------

    def init(self, template: Template, seed: int) -> State:
        """The state before round 1: the given adapter, or A drawn and B = 0.

        Raises:
            ConfigError: an ``init_a`` that is not drawn, without what the template should hold of it.
        """
        taken_out, fresh = self.init_a in TAKEN_OUT, self.init_a in FRESH
        if (taken_out and template.base is None) or not (fresh or template.adapters):
            what = "the base weights" if self.init_a in FROM_BASE else "public examples"
            raise ConfigError(f"strategy.init-a = {self.init_a!r}: needs {what}, use fedlora's ServerApp")
        adapters = template.adapters or fresh_adapters(
            template.modules, template.rank, template.scaling, seed, self.init_a
        )
        self.allocation.check(adapters)
        base = () if template.base is None else (template.base,)
        return State(round=0, adapters=dict(adapters), head=dict(template.head), base=base, seed=seed)

    def broadcast(self, state: State, client: ClientSpec) -> Broadcast:
        """Start of this client's next round: the global adapter at its rank and scaling."""
        allocated = self.allocation.modules(state)
        adapters = self.parted(state, resized(state.adapters, client.rank, client.scaling))
        layers, number = state.adapters.values(), state.round + 1
        return Broadcast(
            adapters=adapters,
            trained=self.trained_names(layers, number),
            uploaded=self.shipped_names(layers, number),
            modules=trained_modules(state, client) & allocated & with_directions(adapters),
            resting=frozenset(state.adapters) - allocated,
            head=state.head,
            updates_base=self.facts.updates_base,
        )

    def aggregate(
        self, state: State, updates: Iterable[ClientUpdate], *, diagnostics: bool = True
    ) -> tuple[State, Diagnostics | None]:
        """One round: normalise weights, merge layer by layer in partition order, measure what it did.

        Layers at rest stay as they are, whatever clients say of them.
        A client of weight zero is checked, then left out altogether, whatever its tensors hold.

        Args:
            state: before the round; untouched.
            updates: in any order.
            diagnostics: measure the round; None is returned instead where they are not wanted.

        Raises:
            FactorShapeError: unequal ranks under a rule without mixed ranks, foreign modules or head.
            ConfigError: no update, two of one client, a negative weight, or weights that sum to zero.
        """
        received = sorted(updates, key=lambda update: update.partition_id)
        starts = self.parted(state, state.adapters)
        for update in received:
            self.check(starts, update, state.round + 1)
        normalised(received)
        counted = self.choose([update for update in received if update.weight > 0])
        weights = normalised(counted)

        allocated, directions = self.allocation.modules(state), self.allocation.directions(state)

        def of(name: str) -> tuple[Merged, LayerMeasure | None]:
            whole = state.adapters[name]
            if name not in allocated:
                return Merged(whole, memory=self.kept(state, name)), None
            layer = self._layer(state, _moving(starts[name]), name, counted, weights)
            merged = self.merge(layer)
            measured = diagnostics and isinstance(layer.adapter, LoraFactors)
            found = measure(layer, merged) if measured else None
            if name in directions:
                again = rejoined(as_lora(whole), as_lora(merged.adapter), directions[name])
                merged = replace(merged, adapter=again)
            return merged, found

        done = dict(zip(state.adapters, parallel_map(of, state.adapters), strict=True))
        merged = {name: m for name, (m, _) in done.items()}
        head, head_memory = self.merge_head(state, counted, weights)
        moved = {name: m.into_base for name, m in merged.items() if m.into_base is not None}
        after = replace(
            state,
            round=state.round + 1,
            adapters={name: m.adapter for name, m in merged.items()},
            head=head,
            base=(*state.base, Patch(moved)) if moved else state.base,
            memory={
                f"{owner}/{short}": tensor
                for owner, kept in [*((n, m.memory) for n, m in merged.items()), ("head", head_memory)]
                for short, tensor in kept.items()
            },
        )
        return after, summarise([m for _, m in done.values() if m is not None], weights)

    @staticmethod
    def kept(state: State, owner: str) -> Tensors:
        """Memory of a layer, or of the head, from the last round."""
        start = f"{owner}/"
        return {k.removeprefix(start): t for k, t in state.memory.items() if k.startswith(start)}

    def parted(self, state: State, adapters: Adapters) -> Adapters:
        """Adapters of any rank with the directions apart that rest in the next round."""
        return all_parted(adapters, self.allocation.directions(state))

    def _layer(
        self, state: State, start: LayerAdapter, name: str, updates: Sequence[ClientUpdate],
        weights: Sequence[float],
    ) -> Layer:  # fmt: skip
        clients = [
            Weighted(w, _moving(update.adapters[name]), update.partition_id)
            for w, update in zip(weights, updates, strict=True)
        ]
        return Layer(name, start, clients, state.round + 1, state.seed, self.kept(state, name))

    def check(self, starts: Adapters, update: ClientUpdate, server_round: int) -> None:
        """Refuse an update over other layers, or of other shapes, than the `parted` adapters have."""
        who = f"round {server_round}, partition {update.partition_id}"
        check_same_modules(starts, update.adapters, who)
        for name, start in starts.items():
            given = update.adapters[name]
            if isinstance(start, LoraFactors) and isinstance(given, LoraFactors):
                check_like(start, given, f"{who}, {name}", "" if self.facts.mixed_ranks else self.facts.name)
            else:
                check_same_shapes(start, given, f"{who}, {name}")


def _moving(adapter: LayerAdapter) -> LayerAdapter:
    """The directions of an adapter that train; another kind than LoRA has none apart."""
    return moving(adapter) if isinstance(adapter, LoraFactors) else adapter


def trained_modules(state: State, client: ClientSpec) -> frozenset[str]:
    """The client's own target modules, or all of them."""
    everything = frozenset(state.adapters)
    return everything if client.modules is None else everything & client.modules
