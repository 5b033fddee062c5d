"""Random federations for Hypothesis, and the few steps with which a test plays a round.

A `Federation` is drawn as plain numbers (shapes, ranks, weights, seeds); the factors themselves come
from named streams of its seed, so that a failing example is short to read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fedlora.core.factors import LoraFactors, Tensors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import Broadcast, ClientSpec, ClientUpdate, ModuleSpec, State, Template
from strategies.facts import Facts
from strategies.registry import RULES, make_rule
from strategies.rule import Rule
from tests import oracles

OWN = os.environ.get("FEDLORA_RULE", "")
"""``module:Class`` of a rule of one's own, which the laws then test in the place of the listed ones."""
DEFAULTS: Mapping[str, Rule] = {name: make_rule(name) for name in ([OWN] if OWN else RULES)}
"""Every rule under test with its defaults."""
VARIANTS: Mapping[str, Rule] = (
    DEFAULTS
    if OWN
    else {
        **DEFAULTS,
        "ffa-orthonormal": make_rule("ffa", {"init_a": "orthonormal"}),
        "fedsvd-every-2": make_rule("fedsvd", {"period": 2}),
        "lora-fair-strong": make_rule("lora-fair", {"lam": 1.0}),
        "lora-fair-plain": make_rule("lora-fair", {"norm": "plain"}),
        "lora-fair-ridge": make_rule("lora-fair", {"solver": "ridge", "lam": 0.1}),
        "lora-fair-a": make_rule("lora-fair", {"correct": "A", "lam": 1.0}),
        "lora-fair-both": make_rule("lora-fair", {"correct": "both", "lam": 1.0}),
        "hetlora-pruning": make_rule("hetlora", {"gamma": 0.5, "min_rank": 1}),
        "fedrot-hard": make_rule("fedrot", {"lam": 1.0}),
        "fedrot-released": make_rule("fedrot", {"lam": 1.5}),
        "fedrot-soft": make_rule("fedrot", {"lam": 0.2}),
        "galore-dct": make_rule("galore", {"projector": "dct"}),
        "florist-half": make_rule("florist", {"threshold": 0.5}),
        "fed-sb-private": make_rule("fed-sb", {"subspace": "private"}),
        "fed-sb-private-diagonal": make_rule("fed-sb", {"subspace": "private", "core": "diagonal"}),
        "fed-sb-cosine": make_rule("fed-sb", {"subspace": "cosine", "core": "diagonal"}),
        "zero-padding-renormalised": make_rule("zero-padding", {"renormalise": True}),
    }
)
"""Every listed rule with its defaults, and some with options."""


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Layers, clients and a seed; what a test needs to play rounds under any rule."""

    modules: Mapping[str, ModuleSpec]
    rank: int
    scaling: float
    clients: tuple[ClientSpec, ...]
    weights: tuple[float, ...]
    seed: int
    head_shapes: tuple[tuple[int, ...], ...] = ()
    dtype: torch.dtype = field(default=torch.float64)

    def suited(self, facts: Facts) -> Federation:
        """The same federation with equal ranks, where the rule needs them.

        So it does where nothing is trained: a warm start cut to a lower rank would count as a change.
        """
        if facts.mixed_ranks and facts.trained:
            return self
        clients = tuple(replace(c, rank=self.rank) for c in self.clients)
        return replace(self, clients=clients)

    def normal(self, shape: Sequence[int], *names: str | int) -> Tensor:
        """Standard normal values of the named stream, in this federation's dtype."""
        stream = torch_stream(self.seed, *names)
        return torch.randn(*shape, generator=stream, dtype=torch.float64).to(self.dtype)

    def template(self) -> Template:
        """A warm start: both factors random, so that nothing hides behind B = 0."""
        return Template(
            modules=self.modules,
            rank=self.rank,
            scaling=self.scaling,
            head={f"head.{i}": self.normal(s, "head", i) for i, s in enumerate(self.head_shapes)},
            adapters={
                name: LoraFactors(
                    self.normal((self.rank, spec.in_features), "A", name),
                    self.normal((spec.out_features, self.rank), "B", name),
                    self.scaling,
                )
                for name, spec in self.modules.items()
            },
        )

    def start(self, rule: Rule) -> State:
        """The rule's state before round 1."""
        return rule.init(self.template(), self.seed)

    def update(self, rule: Rule, state: State, index: int) -> ClientUpdate:
        """One client's reply: every factor that it trains, and the head, moved at random."""
        client = self.clients[index]
        given = rule.broadcast(state, client)
        who = (state.round + 1, client.partition_id)
        adapters = {name: self._trained(given, name, who) for name in given.adapters}
        head = {n: t + self.normal(t.shape, "head", n, *who) for n, t in given.head.items()}
        return ClientUpdate(
            partition_id=client.partition_id, adapters=adapters, head=head, weight=self.weights[index]
        )

    def _trained(self, given: Broadcast, name: str, who: tuple[int, int]) -> LoraFactors:
        factors = given.adapters[name]
        trained = given.trained if name in given.modules else frozenset()
        values = {factor: tensor.to(self.dtype) for factor, tensor in factors.tensors().items()}
        for factor in trained:
            tensor = values[factor]
            values[factor] = tensor + self.normal(tensor.shape, f"trained {factor}", name, *who)
        return LoraFactors(scaling=factors.scaling, **values)

    def updates(self, rule: Rule, state: State, present: Collection[int] | None = None) -> list[ClientUpdate]:
        """The replies of the clients at these positions; None means all."""
        chosen = range(len(self.clients)) if present is None else sorted(present)
        return [self.update(rule, state, index) for index in chosen]


def one_layer(seed: int = 5, clients: int = 3, head_shapes: tuple[tuple[int, ...], ...] = ()) -> Federation:
    """One layer of 9 x 12 and clients of rank 3 with weights 1, 2, 3, ..: nothing is right by chance."""
    return Federation(
        modules={"layer": ModuleSpec(out_features=9, in_features=12)},
        rank=3,
        scaling=2.0,
        clients=tuple(ClientSpec(partition_id=i, rank=3, scaling=2.0) for i in range(clients)),
        weights=tuple(float(i + 1) for i in range(clients)),
        seed=seed,
        head_shapes=head_shapes,
    )


NAMES = ("encoder.0.query", "encoder.0.output", "encoder.1.query")
SHAPES = st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=3)
RANKS, ALPHAS = st.integers(1, 4), st.sampled_from([1.0, 8.0, 16.0, 24.0])
CLIENT = st.tuples(
    st.integers(0, 99),
    RANKS,
    ALPHAS,
    st.floats(0.25, 40.0),
    st.sampled_from([None, (0,), (0, 1), (2,)]),
)
"""Partition id, rank, alpha, weight and the positions of its target modules."""
CLIENTS = {n: st.lists(CLIENT, min_size=n, max_size=5, unique_by=lambda c: c[0]) for n in (1, 2)}
SEEDS = st.integers(0, 2**31)
HEADS = st.sampled_from([(), ((3,),), ((2, 3), (2,))])


@st.composite
def federations(
    draw: st.DrawFn,
    min_clients: int = 1,
    equal_scalings: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Federation:
    """Up to three mostly non-square layers and five clients of any rank, alpha, weight and target."""
    shapes, absent = draw(SHAPES), draw(RANKS)
    alpha, drawn = draw(ALPHAS), draw(CLIENTS[min_clients])
    rank = max(absent, *(r for _, r, *_ in drawn))
    scaling = alpha / rank
    return Federation(
        modules={
            name: ModuleSpec(out_features=o, in_features=i)
            for name, (o, i) in zip(NAMES, shapes, strict=False)
        },
        rank=rank,
        scaling=scaling,
        clients=tuple(
            ClientSpec(
                partition_id=partition_id,
                rank=r,
                scaling=scaling if equal_scalings else alpha / r,
                modules=None if target is None else _targets(target, len(shapes)),
            )
            for partition_id, r, alpha, _, target in drawn
        ),
        weights=tuple(weight for *_, weight, _ in drawn),
        seed=draw(SEEDS),
        head_shapes=draw(HEADS),
        dtype=dtype,
    )


def _targets(positions: tuple[int, ...], modules: int) -> frozenset[str]:
    return frozenset(NAMES[position % modules] for position in positions)


def effective(state: State) -> dict[str, oracles.Array]:
    """The dense (out, in) change of each layer's weight since W_0: patches + s B A."""
    total = {name: numpy(factors.delta()) for name, factors in state.adapters.items()}
    for patch in state.base:
        for name, product in patch.products.items():
            total[name] = total[name] + numpy(product.dense())
    return total


def oracle_layer(
    state: State, updates: Sequence[ClientUpdate], name: str
) -> tuple[oracles.Adapter, list[oracles.Client]]:
    """One layer as the oracles want it."""
    start, total = state.adapters[name], sum(update.weight for update in updates)
    clients = [
        oracles.Client(p=update.weight / total, s=f.scaling, **_arrays(f))
        for update, f in ((update, update.adapters[name]) for update in updates)
    ]
    return oracles.Adapter(s=start.scaling, **_arrays(start)), clients


def _arrays(factors: LoraFactors) -> dict[str, oracles.Array]:
    dense = {f: torch.block_diag(*x) if x.ndim == 3 else x for f, x in factors.tensors().items()}
    return {factor: numpy(tensor) for factor, tensor in dense.items()}


def numpy(tensor: Tensor) -> oracles.Array:
    """Float64 values of a tensor."""
    return np.asarray(tensor.detach().double().numpy(), dtype=np.float64)


def relative(given: oracles.Array, expected: oracles.Array) -> float:
    """``||given - expected|| / ||expected||``; the plain norm where nothing is expected."""
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(given - expected)) / (size if size > 0 else 1.0)


def named_tensors(state: State) -> Tensors:
    """Every tensor of a state under a unique name; what "the same bits" is asked of."""
    found: Tensors = {f"head {n}": t for n, t in state.head.items()}
    found |= {f"memory {n}": t for n, t in state.memory.items()}
    for name, factors in state.adapters.items():
        found |= {f"{factor} {name}": tensor for factor, tensor in factors.tensors().items()}
    for version, patch in enumerate(state.base):
        for name, product in patch.products.items():
            found |= {f"P{version} left {name}": product.left, f"P{version} right {name}": product.right}
    return found


def assert_same_bits(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bits, NaN included."""
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype, name
        assert given[name].shape == tensor.shape, name
        assert given[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name
