"""Values that travel between server and clients or stay at the server: frozen dataclasses, no flwr."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedlora.core.adapters import Adapters, as_lora
from fedlora.core.base_patches import Patch
from fedlora.core.factors import Product, Tensors, add, as_product


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSpec:
    """One adapted linear layer of the base model."""

    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Facts of the model that a rule needs before round 1.

    Attributes:
        modules: every adapted layer, in the order of the model.
        rank: the global adapter's rank (the largest over all clients).
        scaling: the global adapter's scaling.
        head: initial values of the other trained tensors (empty if there are none).
        adapters: a given starting adapter; None draws a fresh one (B = 0).
        base: a change of the base that belongs to the given adapter, for instance ``-s B A`` of an
            initialisation that keeps the model's function (PiSSA); None where there is none.
        gradients: module -> (out, in) gradient of the loss at the base W_0 on public examples; None
            unless the rule asks for it (`Rule.gradient_examples`).
        weight: the (out, in) weight W_0 of a module; None unless the rule asks for it
            (`Rule.base_weights`).
    """

    modules: Mapping[str, ModuleSpec]
    rank: int
    scaling: float
    head: Tensors = field(default_factory=dict)
    adapters: Adapters | None = None
    base: Patch | None = None
    gradients: Tensors | None = None
    weight: Callable[[str], Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSpec:
    """Settings of one client, as the server has decided them.

    Attributes:
        partition_id: which client.
        rank: the rank of its adapter.
        scaling: its own alpha / rank.
        modules: the modules it trains; None means all. The others stay as broadcast.
    """

    partition_id: int
    rank: int
    scaling: float
    modules: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRegularizer:
    """``weight * sum over layers of ||B[:, start:]||_F ||A[start:, :]||_F`` in a client's loss (HetLoRA)."""

    weight: float
    start: int


@dataclass(frozen=True, slots=True)
class Trainable:
    """The parameters that a client trains; ``query.A`` is the factor A of ``query``.

    Attributes:
        factors, head: what is trained.
        tail: what is added to the loss.
        frozen: the factors of adapted layers that are not trained.
        control: what is taken off the gradients, by name, see `clients.control`.
        scaling: of each adapted layer.
    """

    factors: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]
    tail: RankRegularizer | None = None
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: Mapping[str, float | Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def all(self) -> list[nn.Parameter]:
        return [*self.factors.values(), *self.head.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """Starting values of one client in one round.

    Attributes:
        adapters: the starting adapter, at the client's rank and scaling, over all modules.
        trained: the names of the tensors of a layer that it trains, of LoRA a subset of {"A", "B", "R"}; the
            rest stays as it is here.
        uploaded: which of them come back; the rest stays at the client.
        modules: the modules whose tensors it trains.
        head: the other trained tensors.
        fresh_seed: where set, ``adapters`` is ``fresh_adapters(..., fresh_seed)`` and need not travel.
        tail: where set, what the client adds to its loss.
        updates_base: later rounds will send base patches.
        resting: modules that nobody trains in this round.
        choose: where set, the client lets so many directions of all layers count, those that it changed most.
    """

    adapters: Adapters
    trained: frozenset[str]
    uploaded: frozenset[str]
    modules: frozenset[str]
    head: Tensors
    fresh_seed: int | None = None
    tail: RankRegularizer | None = None
    updates_base: bool = False
    resting: frozenset[str] = frozenset()
    choose: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientUpdate:
    """One client's contribution to a round.

    Attributes:
        partition_id: who it is from; sums run in this order.
        adapters: all tensors of every module after training; what was not shipped is as broadcast.
        head: the other trained tensors after training (empty if there are none).
        weight: its unnormalised weight, usually the number of examples.
    """

    partition_id: int
    adapters: Adapters
    head: Tensors
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything a rule knows between two rounds.

    Attributes:
        round: rounds aggregated so far; 0 before the first.
        adapters: the global adapter. The global model is base + patches + this.
        head: the other trained tensors.
        base: the patches P_1 .. P_v, or their sum and those that came after it.
        memory: a rule's own tensors.
        seed: the root seed of the run.
    """

    round: int
    adapters: Adapters
    head: Tensors
    base: tuple[Patch, ...] = ()
    memory: Tensors = field(default_factory=dict)
    seed: int = 0

    @property
    def moved(self) -> frozenset[str]:
        """The layers whose base weight a patch has changed."""
        return frozenset(name for patch in self.base for name in patch.products)

    def product(self, name: str) -> Product:
        """Sum that the global model adds to one layer of the pristine base: its patches and its adapter."""
        patches = [patch.products[name] for patch in self.base if name in patch.products]
        adapter = as_lora(self.adapters[name])
        return add(*patches, as_product(adapter)) if adapter.B.any() or not patches else add(*patches)


@dataclass(frozen=True, slots=True)
class InFlight:
    """One client at work in a run whose rounds do not wait, or done and not aggregated yet.

    Attributes:
        partition_id: who it is.
        version: rounds aggregated when it started.
        arrives: when its reply comes or it is given up, in simulated seconds since the start of the run.
        number: tells all of a run apart, in the order of their start.
        tensors: what it brings, by layer and name; empty until it has trained.
        weight: its unnormalised weight.
        loss: its training loss, if it says.
        lost: why no reply will come; empty: one will.
        refused: why its reply cannot be used.
        ordered: when it was asked, in simulated seconds since the start of the run.
    """

    partition_id: int
    version: int
    arrives: float
    number: int
    tensors: Tensors = field(default_factory=dict)
    weight: float = 0.0
    loss: float | None = None
    lost: str = ""
    refused: str = ""
    ordered: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that a strategy must remember between two rounds to go on with the same bits.

    Attributes:
        state: the rule's state.
        participations: partition id -> rounds it was asked to train in.
        acknowledged: partition id -> digests that it has acknowledged.
        ledger_heads: partition id -> the head of its privacy ledger when it last said.
        in_flight: the clients at work, where rounds do not wait for them.
        asked: partition id -> the round in which it was last asked to train, where that limits the next.
        private: what client-level privacy goes on from: noise that is taken back later, or its clipping norm.
    """

    state: State
    participations: dict[int, int] = field(default_factory=dict)
    acknowledged: dict[int, set[str]] = field(default_factory=dict)
    ledger_heads: dict[int, str] = field(default_factory=dict)
    in_flight: tuple[InFlight, ...] = ()
    asked: dict[int, int] = field(default_factory=dict)
    private: Tensors = field(default_factory=dict)
