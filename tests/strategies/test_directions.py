"""Whatever directions rest: they keep their bits, and the others become what the rule makes of them alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapters import as_lora
from fedlora.core.directions import parted, rejoined, sizes
from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientUpdate, ModuleSpec, State
from fedlora.errors import ConfigError, FactorShapeError, NotApplicable
from strategies.allocation import Allocation, make_allocation
from strategies.registry import RULES, make_rule
from strategies.rule import Rule
from strategies.server_optimizer import ServerOptimizer
from strategies.streaming import aggregate_stream, streams
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    effective,
    federations,
    named_tensors,
    one_layer,
)

REFUSE = {
    "clustered": "all layers",
    "fed-sb": "core", "fedsa": "clients", "flora": "new adapter", "florist": "new adapter",
    "fslora": "chooses", "head-only": "trains no layer", "hetlora": "prunes", "local-only": "clients",
    "lora-a2": "choose", "galore": "turn",
}  # fmt: skip
"""Rules under which no direction can rest, and a word of the reason."""
ABLE = [name for name in RULES if name not in REFUSE]
each_rule = pytest.mark.parametrize("name", ABLE)
WIDE = {
    f"h.{block}.{part}": ModuleSpec(out_features=9, in_features=12) for block in range(2) for part in "qv"
}


def few(**options: Any) -> Allocation:
    return make_allocation("sized-ranks", {"warmup": 0, **options})


def wide(rule: Rule) -> Federation:
    """Four layers of rank 3, three clients."""
    return replace(one_layer(), modules=WIDE).suited(rule.facts)


def alone(state: State, chosen: Allocation) -> State:
    """The state of the layers and directions that a round trains, as if there were no others."""
    directions = chosen.directions(state)
    adapters = {name: as_lora(state.adapters[name]) for name in chosen.modules(state)}
    return replace(
        state,
        adapters={
            name: only(f, directions[name]) if name in directions else f for name, f in adapters.items()
        },
    )


def only(factors: LoraFactors, training: Any) -> LoraFactors:
    rows = sorted(j for j in training if j < factors.rank)
    return LoraFactors(factors.A[rows], factors.B[:, rows], factors.scaling)


@each_rule
@given(federation=federations(), rounds=st.integers(1, 2))
def test_directions_rest_or_become_what_the_rule_makes_of_them_alone(
    name: str, federation: Federation, rounds: int
) -> None:
    """So a rule that is exact is exact on them: what rests is a part of the base for a round."""
    chosen = few()
    some, everything = make_rule(name, allocation=chosen), make_rule(name)
    federation = federation.suited(some.facts)
    state = federation.start(some)
    for _ in range(rounds):
        directions, modules = chosen.directions(state), chosen.modules(state)
        updates = federation.updates(some, state)
        after, _ = some.aggregate(state, updates)
        stripped = [
            replace(
                u,
                adapters={n: LoraFactors(f.A, f.B, f.scaling) for n, f in lora(u).items() if n in modules},
            )
            for u in updates
        ]
        wanted, _ = everything.aggregate(alone(state, chosen), stripped)
        for module in state.adapters:
            before, now = as_lora(state.adapters[module]), as_lora(after.adapters[module])
            rests = [j for j in range(before.rank) if j not in directions.get(module, range(before.rank))]
            assert torch.equal(now.A[rests], before.A[rests])
            assert torch.equal(now.B[:, rests], before.B[:, rests])
            if module not in modules:
                continue
            moved = only(now, set(range(now.rank)) - set(rests))
            assert_same_bits(moved.tensors(), as_lora(wanted.adapters[module]).tensors())
        assert [p.digest() for p in after.base] == [p.digest() for p in wanted.base]
        assert_same_bits(dict(after.head), dict(wanted.head))
        state = after


def lora(update: ClientUpdate) -> dict[str, LoraFactors]:
    return {name: as_lora(adapter) for name, adapter in update.adapters.items()}


@each_rule
def test_exact_rules_are_exact_whatever_rests(name: str) -> None:
    """Against the clients' own models: W' = W + sum_k p_k dW_k, in float64."""
    rule = make_rule(name, allocation=few(ranks=5))
    if not rule.facts.exact:
        return
    federation = wide(rule)
    state = federation.start(rule)
    for _ in range(3):
        updates = federation.updates(rule, state)
        after, _ = rule.aggregate(state, updates)
        total = sum(u.weight for u in updates)
        for module, change in effective(after).items():
            asked = sum(u.weight / total * lora(u)[module].delta() for u in updates)
            assert isinstance(asked, torch.Tensor)
            wanted = effective(state)[module] + (asked - as_lora(state.adapters[module]).delta()).numpy()
            np.testing.assert_allclose(change, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
        state = after


@each_rule
def test_the_order_of_clients_does_not_matter_and_one_alone_is_taken_over(name: str) -> None:
    rule = make_rule(name, allocation=few(ranks=5))
    federation = wide(rule)
    state = federation.start(rule)
    updates = federation.updates(rule, state)
    first, turned = (rule.aggregate(state, order)[0] for order in (updates, updates[::-1]))
    assert_same_bits(named_tensors(first), named_tensors(turned))
    if rule.facts.single_client_exact and not rule.facts.rotates_basis:
        after, _ = rule.aggregate(state, updates[:1])
        for module, change in effective(after).items():
            own = lora(updates[0])[module].delta() + torch.as_tensor(
                effective(state)[module] - as_lora(state.adapters[module]).delta().numpy()
            )
            np.testing.assert_allclose(change, own.numpy(), rtol=0, atol=1e-9)


@each_rule
def test_rounds_of_which_updates_come_one_by_one(name: str) -> None:
    rule = make_rule(name, allocation=few(ranks=5))
    if not streams(rule):
        return
    federation = wide(rule)
    state = federation.start(rule)
    updates = sorted(federation.updates(rule, state), key=lambda u: u.partition_id)
    wanted, found = rule.aggregate(state, updates)[0], aggregate_stream(rule, state, updates)
    for key, tensor in named_tensors(wanted).items():
        torch.testing.assert_close(named_tensors(found)[key], tensor, rtol=0, atol=1e-12)


def sized(given: dict[str, list[float]]) -> State:
    """A state whose directions have these sizes."""
    adapters = {
        name: LoraFactors(torch.eye(len(own), 5), torch.eye(4, len(own)) * torch.tensor(own) / 2.0, 2.0)
        for name, own in given.items()
    }
    return State(round=1, adapters=adapters, head={}, seed=1)


def test_the_largest_train_beside_those_that_are_drawn() -> None:
    """Against the rule in words: of 8 directions 4 train, one of them drawn, three the largest left."""
    state = sized({"a": [5.0, 1.0, 7.0, 0.5], "b": [6.0, 2.0, 0.1, 0.2]})
    chosen = make_allocation("sized-ranks", {"ranks": 4, "explore": 0.25, "period": 1})
    order = [("a", 2), ("b", 0), ("a", 0), ("b", 1), ("a", 1), ("a", 3), ("b", 3), ("b", 2)]
    drawn: Counter[tuple[str, int]] = Counter()
    for number in range(400):
        found = chosen.directions(replace(state, round=number + 1))
        pairs = {(name, j) for name in "ab" for j in found[name]}
        assert len(pairs) == 4
        odd = pairs - set(order[:3])
        assert pairs >= set(order[:3])
        drawn.update(odd)
    # the fourth is the drawn one, or where a large one was drawn the fourth largest
    expected = dict.fromkeys(order[4:], 1 / 8) | {order[3]: 4 / 8}
    for place, share in expected.items():
        assert abs(drawn[place] / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5


def test_sizes_are_singular_values_where_a_rule_writes_an_svd() -> None:
    rule = make_rule("flexlora")
    federation = wide(rule)
    state = federation.start(rule)
    after, _ = rule.aggregate(state, federation.updates(rule, state))
    for adapter in after.adapters.values():
        factors = as_lora(adapter)
        wanted = torch.linalg.svdvals(factors.delta())[: factors.rank]
        torch.testing.assert_close(sizes(factors).sort(descending=True).values, wanted)


def test_a_choice_is_a_function_of_the_state_and_holds_for_its_period() -> None:
    rule = make_rule(
        "fedavg", allocation=make_allocation("sized-ranks", {"ranks": 5, "period": 3, "warmup": 2})
    )
    state = wide(rule).start(rule)
    choices = [rule.allocation.directions(replace(state, round=t)) for t in range(242)]
    assert choices == [rule.allocation.directions(replace(state, round=t)) for t in range(242)]
    assert choices[:2] == [{}, {}]
    assert all(choices[t] == choices[2 + (t - 2) // 3 * 3] for t in range(2, 242))
    trained = {(n, j) for c in choices[2:] for n, own in c.items() for j in own}
    assert trained == {(n, j) for n in WIDE for j in range(3)}
    for t in range(2, 242):
        now = replace(state, round=t)
        whole = sum(3 for n in rule.allocation.modules(now) if n not in choices[t])
        assert whole + sum(len(own) for own in choices[t].values()) == 5
        assert rule.allocation.modules(now) == {n for n in WIDE if choices[t].get(n, (0,))}


def test_a_client_of_low_rank_trains_what_it_has() -> None:
    """A layer of which it has no direction that trains is at rest with it alone."""
    rule = make_rule("zero-padding", allocation=few(ranks=4))
    state = wide(rule).start(rule)
    directions = rule.allocation.directions(state)
    small = replace(wide(rule).clients[0], rank=1)
    given = rule.broadcast(state, small)
    for name, own in directions.items():
        factors = as_lora(given.adapters[name])
        assert (factors.rank, factors.whole_rank) == (sum(j < 1 for j in own), 1)
        assert (name in given.modules) == (0 in own)


@pytest.mark.parametrize(("name", "word"), REFUSE.items())
def test_rules_under_which_none_can_rest_say_why(name: str, word: str) -> None:
    with pytest.raises(NotApplicable, match=rf"^strategy\.allocation = 'sized-ranks': {name} .*{word}"):
        make_rule(name, allocation=few())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": -1}, "ranks = -1: must be >= 0"),
        ({"warmup": -1}, "warmup = -1: must be >= 0"),
        ({"period": 0}, "period = 0: must be >= 1"),
        ({"explore": 0.0}, "explore = 0.0: must be > 0 and <= 1"),
        ({"ranks": 2.0}, r"ranks = 2.0: sized-ranks accepts ranks \(int\), warmup \(int\)"),
    ],
)
def test_options_are_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^strategy\.allocation-options {words}"):
        make_allocation("sized-ranks", options)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"ranks = 4: the model's adapters have 3 in all$"):
        one_layer().start(make_rule("fedavg", allocation=few(ranks=4)))
    with pytest.raises(NotApplicable, match=r"server-optimizer = 'fedavgm' has a momentum"):
        make_rule("fedavg", optimizer=ServerOptimizer(name="fedavgm"), allocation=few())
    rule = make_rule("fedavg", allocation=few(ranks=5))
    federation = wide(rule)
    state = federation.start(rule)
    update = federation.update(make_rule("fedavg"), state, 0)  # of somebody who trained all directions
    with pytest.raises(FactorShapeError, match="has rank 3, expected"):
        rule.aggregate(state, [update])


def test_parts_put_together_are_the_whole() -> None:
    g = torch.Generator().manual_seed(2)
    whole = LoraFactors(torch.randn(4, 6, generator=g), torch.randn(5, 4, generator=g), 0.5)
    for training in ([], [3, 1], [0, 1, 2, 3], [1, 9]):
        part = parted(whole, training)
        assert part.whole_rank == 4
        torch.testing.assert_close(part.delta(), whole.delta())
        again = rejoined(whole, LoraFactors(part.A, part.B, 0.5), training)
        assert_same_bits(again.tensors(), whole.tensors())
    with pytest.raises(FactorShapeError, match="both of A0 and B0"):
        LoraFactors(whole.A, whole.B, 0.5, A0=whole.A)
    with pytest.raises(FactorShapeError, match=r"A0 \(4, 6\) and B0 \(5, 3\) are not"):
        LoraFactors(whole.A, whole.B, 0.5, A0=whole.A, B0=whole.B[:, :3])
