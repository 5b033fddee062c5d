"""FLoRA: the stack is the sum, the start is fresh, the patches stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from hypothesis import given
from torch.nn.functional import linear

from fedlora.core.factors import as_product
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State, Template
from strategies.layer import Layer, Merged, Weighted
from strategies.registry import make_rule
from strategies.rules.flora import FLoRARule
from tests import oracles
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    effective,
    federations,
    numpy,
    oracle_layer,
    relative,
)

RULE = make_rule("flora")
MODULES = {name: ModuleSpec(out_features=7, in_features=5) for name in ("q", "v", "z")}


def miss(rule: FLoRARule, federation: Federation) -> float:
    """``||W_after - W_before - sum_k p_k s_k B_k A_k|| / ||sum||`` of the first layer, trained by all."""
    everything = tuple(replace(c, modules=None) for c in federation.clients)
    federation = replace(federation, clients=everything)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    name = next(iter(before.adapters))
    after, _ = rule.aggregate(before, updates)
    wanted = oracles.mean_update(oracle_layer(before, updates, name)[1])
    return relative(effective(after)[name] - effective(before)[name], wanted)


@dataclass(frozen=True, kw_only=True)
class TwiceWeighted(FLoRARule):
    """The known mistake: p_k in B as well, so that products carry p_k^2."""

    def merge(self, layer: Layer) -> Merged:
        scaled = [Weighted(c.weight, replace(c.factors, B=c.weight * c.factors.B)) for c in layer.clients]
        return super().merge(replace(layer, clients=scaled))


@given(federation=federations(min_clients=2))
def test_weights_in_both_factors_would_be_found(federation: Federation) -> None:
    """In every federation of two or more, not only in lucky ones."""
    assert miss(FLoRARule(), federation) < 1e-10
    assert miss(TwiceWeighted(), federation) > 1e-3


def test_clients_that_do_not_train_a_layer_take_no_room_in_its_patch_and_a_patch_of_nothing_is_none() -> None:
    """All layers' adapters begin as zero, so that products of theirs would be zeros that travel."""
    state = RULE.init(Template(modules=MODULES, rank=3, scaling=1.0), seed=1)
    specs = [
        ClientSpec(partition_id=k, rank=r, scaling=1.0, modules=frozenset(names))
        for k, (r, names) in enumerate([(1, {"q"}), (2, {"q", "v"}), (3, {"q"})])
    ]
    updates = []
    for spec in specs:
        given = RULE.broadcast(state, spec)
        adapters = {
            name: replace(f, B=torch.full_like(f.B, float(name in given.modules)))  # type: ignore[type-var]
            for name, f in given.adapters.items()
        }
        updates.append(ClientUpdate(partition_id=spec.partition_id, adapters=adapters, head={}, weight=1.0))
    after, _ = RULE.aggregate(state, updates)
    assert {name: p.rank_bound for name, p in after.base[0].products.items()} == {"q": 6, "v": 2}
    torch.testing.assert_close(
        after.base[0].products["v"].dense(), as_product(updates[1].adapters["v"]).dense() / 3
    )


@given(federation=federations())
def test_the_stack_is_a_lora_adapter_of_rank_sum_r_and_scaling_one(federation: Federation) -> None:
    """Loaded as such, forward through W x + B (A x) equals forward through the merged weight."""
    before = federation.start(RULE)
    after, _ = RULE.aggregate(before, federation.updates(RULE, before))
    for name, product in after.base[-1].products.items():
        W = federation.normal((product.left.shape[0], product.right.shape[1]), "W", name)
        x = federation.normal((3, W.shape[1]), "x", name)
        training = [c for c in federation.clients if c.modules is None or name in c.modules]
        assert product.rank_bound == sum(c.rank for c in training)
        adapter = linear(x, W) + linear(linear(x, product.right), product.left)
        merged = linear(x, W + product.dense())
        assert relative(numpy(adapter), numpy(merged)) < 1e-12


@given(federation=federations(min_clients=2))
def test_every_client_starts_afresh_from_its_own_seed(federation: Federation) -> None:
    """B = 0 and a drawn A: anew each round, another for each client, the same for whoever asks again."""
    state = federation.start(RULE)
    later, _ = RULE.aggregate(state, federation.updates(RULE, state))
    draws: list[torch.Tensor] = []
    for s in (state, later):
        for client in federation.clients:
            given = RULE.broadcast(s, replace(client, rank=2))
            again = RULE.broadcast(s, replace(client, rank=2))
            assert given.fresh_seed is not None
            named = fresh_adapters(federation.modules, 2, client.scaling, given.fresh_seed, RULE.init_a)
            for name, factors in given.adapters.items():
                assert not factors.B.any()
                for other in (again.adapters[name], named[name]):
                    assert_same_bits({"A": other.A}, {"A": factors.A})
            draws.append(next(iter(given.adapters.values())).A)
    for i, one in enumerate(draws):
        assert not any(torch.equal(one, other) for other in draws[i + 1 :])


@given(federation=federations(min_clients=2))
def test_patches_accumulate_in_order_and_keep_their_bits(federation: Federation) -> None:
    """Round t adds one patch; the earlier ones are the same objects, so a client may lack any of them."""
    state = federation.start(RULE)
    history: list[State] = [state]
    for _ in range(3):
        history.append(RULE.aggregate(history[-1], federation.updates(RULE, history[-1]))[0])
    for earlier, later in pairwise(history):
        assert len(later.base) == len(earlier.base) + 1
        assert all(a is b for a, b in zip(earlier.base, later.base, strict=False))
    digests = [patch.digest() for patch in history[-1].base]
    assert len(set(digests)) == len(digests)


@given(federation=federations())
def test_a_given_adapter_becomes_the_first_patch_and_an_empty_one_does_not(federation: Federation) -> None:
    template = federation.template()
    assert template.adapters is not None
    state = RULE.init(template, federation.seed)
    assert len(state.base) == 1
    assert all(not f.B.any() for f in state.adapters.values())
    empty = {n: replace(f, B=torch.zeros_like(f.B)) for n, f in template.adapters.items()}
    for without in (replace(template, adapters=empty), replace(template, adapters=None)):
        assert RULE.init(without, federation.seed).base == ()
