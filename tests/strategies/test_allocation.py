"""Whatever layers rest: they keep their bits, and the others become what the rule makes of them anyway."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.base_patches import Patch
from fedlora.core.factors import LoraFactors, Product
from fedlora.core.state import ModuleSpec, State
from fedlora.errors import ConfigError, NotApplicable
from strategies.allocation import ALLOCATIONS, make_allocation
from strategies.named import NAMED
from strategies.registry import RULES, make_rule
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    effective,
    federations,
    named_tensors,
    one_layer,
)

FEW: dict[str, dict[str, Any]] = {"random-layers": {"layers": 1}, "sized-layers": {"layers": 1}}
"""Options under which an allocation leaves layers at rest; one without an entry is tried as it is."""
TRAINS = [name for name in RULES if not make_rule(name).needs_all_layers]
LAYERS = [name for name, kind in ALLOCATIONS.items() if not kind().parts]
"""Those that let layers rest, and none of their directions."""
each_allocation = pytest.mark.parametrize("allocation", LAYERS)
each_rule = pytest.mark.parametrize("name", TRAINS)


@each_rule
@each_allocation
@given(federation=federations(), rounds=st.integers(1, 2))
def test_a_layer_rests_or_becomes_what_the_rule_makes_of_it(
    name: str, allocation: str, federation: Federation, rounds: int
) -> None:
    """So a rule that is exact on all layers is exact on these."""
    chosen = make_allocation(allocation, FEW.get(allocation))
    some, everything = make_rule(name, allocation=chosen), make_rule(name)
    clients = tuple(replace(c, modules=None) for c in federation.clients)
    federation = replace(federation, clients=clients).suited(some.facts)
    state = federation.start(some)
    for _ in range(rounds):
        trained = chosen.modules(state)
        assert trained
        assert all(some.broadcast(state, client).modules == trained for client in clients)
        assert some.broadcast(state, clients[0]).resting == frozenset(state.adapters) - trained
        updates = federation.updates(some, state)
        after, _ = some.aggregate(state, updates)
        whole, _ = everything.aggregate(state, updates)
        before, now, full = (named_tensors(s) for s in (state, after, whole))
        resting = frozenset(state.adapters) - trained
        rests = {key for key in now if any(key.endswith(f" {m}") for m in resting)}
        assert_same_bits({key: now[key] for key in rests}, {key: before[key] for key in rests})
        moves = {key for key in full if any(key.endswith(f" {m}") for m in trained)} | {
            key for key in full if key.startswith("head ")
        }
        assert_same_bits({key: now[key] for key in moves}, {key: full[key] for key in moves})
        for patch in after.base[len(state.base) :]:
            assert patch.products.keys() <= trained
        for module in resting:
            assert (effective(after)[module] == effective(state)[module]).all()
        state = after


@each_allocation
def test_the_choice_is_a_function_of_the_state_alone(allocation: str) -> None:
    modules = {f"h.{b}.{part}": ModuleSpec(out_features=3, in_features=4) for b in range(6) for part in "qv"}
    federation = replace(one_layer(), modules=modules)
    chosen = make_allocation(allocation, FEW.get(allocation))
    rule = make_rule("fedavg", allocation=chosen)
    state = federation.start(rule)
    choices = [chosen.modules(replace(state, round=t)) for t in range(40)]
    assert choices == [chosen.modules(replace(state, round=t)) for t in range(40)]
    assert frozenset().union(*choices) == frozenset(modules)
    if allocation != "all":
        assert {len(choice) for choice in choices} == {2}
        assert all(len({module.split(".")[1] for module in choice}) == 1 for choice in choices)
        assert choices != [chosen.modules(replace(state, round=t, seed=6)) for t in range(40)]


def test_memory_and_momentum_of_a_layer_at_rest_stay() -> None:
    from strategies.server_optimizer import ServerOptimizer

    modules = {f"h.{b}.q": ModuleSpec(out_features=3, in_features=4) for b in range(3)}
    federation = replace(one_layer(), modules=modules)
    chosen = make_allocation("random-layers", {"layers": 1})
    rule = make_rule("fedavg", optimizer=ServerOptimizer(name="fedavgm"), allocation=chosen)
    state = federation.start(rule)
    for _ in range(6):
        (trained,) = chosen.modules(state)
        after, _ = rule.aggregate(state, federation.updates(rule, state))
        for key, tensor in state.memory.items():
            if not key.startswith((f"{trained}/", "head/")):
                assert_same_bits({key: after.memory[key]}, {key: tensor})
        assert any(key.startswith(f"{trained}/") for key in after.memory)
        state = after


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, r"^strategy\.allocation-options layers = 0: must be >= 1$"),
        (
            {"layers": "2"},
            r"^strategy\.allocation-options layers = '2': random-layers accepts layers \(int",
        ),
        ({"blocks": 2}, r"^strategy\.allocation-options blocks = 2: random-layers accepts layers \(int\)$"),
    ],
)
def test_options_are_refused_in_one_line(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_allocation("random-layers", options)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    chosen = make_allocation("random-layers", {"layers": 2})
    with pytest.raises(ConfigError, match=r"^strategy\.allocation = 'x': accepted are all, random-"):
        make_allocation("x")
    with pytest.raises(ConfigError, match="the model has 1 blocks with adapters"):
        one_layer().start(make_rule("fedavg", allocation=chosen))
    with pytest.raises(NotApplicable, match=r"^strategy\.allocation = 'random-layers': head-only trains no"):
        make_rule("head-only", allocation=chosen)
    with pytest.raises(NotApplicable, match="fed-sb finds A and B of every layer in its first two rounds"):
        make_rule("fed-sb", {"subspace": "private"}, allocation=chosen)
    assert NAMED["FedAvg"](allocation=chosen).rule.allocation == chosen


def moved_by(sizes: dict[str, float]) -> State:
    """A state whose layers have moved so far, each entry on average."""
    adapters = {
        name: LoraFactors(torch.ones(1, 4), torch.full((3, 1), size / 2.0), 2.0)
        for name, size in sizes.items()
    }
    return State(round=3, adapters=adapters, head={}, seed=1)


def test_blocks_that_moved_far_are_drawn_in_their_proportion() -> None:
    """Against the formula, by counts; a block of two layers counts by the mean of its squares."""
    state = moved_by({"h.0.q": 6.0, "h.0.v": 8.0, "h.1.q": 1.0, "h.2.q": 0.0})
    chosen, rounds = make_allocation("sized-layers", {"layers": 1, "explore": 0.3}), 3000
    counts = Counter(min(chosen.modules(replace(state, round=t))) for t in range(rounds))
    sizes = {"h.0.q": 50**0.5, "h.1.q": 1.0, "h.2.q": 0.0}
    for name, size in sizes.items():
        wanted = 0.1 + 0.7 * size / sum(sizes.values())
        assert abs(counts[name] / rounds - wanted) < 4 * (wanted * (1 - wanted) / rounds) ** 0.5


def test_patches_count_as_much_as_adapters() -> None:
    state = moved_by({"h.0.q": 0.0, "h.1.q": 0.0})
    patch = Patch({"h.1.q": Product(torch.ones(3, 1), torch.ones(1, 4))})
    chosen = make_allocation("sized-layers", {"layers": 1, "explore": 1e-9})
    for t in range(20):
        assert chosen.modules(replace(state, base=(patch,), round=t)) == {"h.1.q"}


def test_who_never_explores_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"explore = 0.0: must be > 0 and <= 1"):
        make_allocation("sized-layers", {"explore": 0.0})
