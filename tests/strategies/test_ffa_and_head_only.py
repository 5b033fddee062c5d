"""The rules that freeze a factor for good, and the control that freezes both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from fedlora.core.state import State
from strategies.registry import make_rule
from strategies.rule import Rule
from tests.strategies.federations import Federation, assert_same_bits, federations


def after_rounds(rule: Rule, federation: Federation, rounds: int) -> tuple[State, State]:
    first = state = federation.start(rule)
    for _ in range(rounds):
        state, _ = rule.aggregate(state, federation.updates(rule, state))
    return first, state


@pytest.mark.parametrize(
    "rule", [make_rule("ffa"), make_rule("head-only"), make_rule("fedsvd", {"period": 4})], ids=repr
)
@given(federation=federations())
def test_a_keeps_its_first_bits(rule: Rule, federation: Federation) -> None:
    """FedSVD too, before its first refactorisation."""
    first, last = after_rounds(rule, federation.suited(rule.facts), 3)
    assert_same_bits({n: f.A for n, f in last.adapters.items()}, {n: f.A for n, f in first.adapters.items()})


@given(federation=federations())
def test_head_only_moves_the_head_and_keeps_the_adapter(federation: Federation) -> None:
    rule = make_rule("head-only")
    first, last = after_rounds(rule, replace(federation.suited(rule.facts), head_shapes=((3,),)), 2)
    assert_same_bits({n: f.B for n, f in last.adapters.items()}, {n: f.B for n, f in first.adapters.items()})
    assert not torch.equal(last.head["head.0"], first.head["head.0"])
