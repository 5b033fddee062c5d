"""Clusters by B: who is with whom, what each starts from, and what becomes of those who come late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapters import lora_set
from fedlora.core.factors import AdapterSet, LoraFactors
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State, Template
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.results import read_rounds
from fedlora.server.validate import check
from fedlora.simulation.simulate import simulate
from strategies.registry import make_rule
from strategies.rules.clustered import ClusteredRule, cluster, distances
from tests import oracles
from tests.conftest import tiny_config

LAYERS = {name: ModuleSpec(out_features=6, in_features=5) for name in ("q", "v")}
RULE = ClusteredRule()


def adapter(kind: int, number: int, scale: float = 0.1) -> AdapterSet:
    """A client's factors: those of its kind, and something of its own."""
    of, own = (torch.Generator().manual_seed(n) for n in (kind, 100 + number))

    def draw(*shape: int) -> torch.Tensor:
        shared, apart = (torch.randn(*shape, generator=g, dtype=torch.float64) for g in (of, own))
        return shared + scale * apart

    return {name: LoraFactors(draw(2, 5), draw(6, 2), 2.0) for name in LAYERS}


def start(rule: ClusteredRule = RULE) -> State:
    return rule.init(Template(modules=LAYERS, rank=2, scaling=2.0), seed=1)


def updates(kinds: Mapping[int, int], scale: float = 0.1, turn: int = 0) -> list[ClientUpdate]:
    return [
        ClientUpdate(partition_id=p, adapters=adapter(kind, p + turn, scale), head={}, weight=1.0 + p)
        for p, kind in kinds.items()
    ]


def begins(rule: ClusteredRule, state: State, partition: int) -> AdapterSet:
    given = rule.broadcast(state, ClientSpec(partition_id=partition, rank=2, scaling=2.0))
    return lora_set(given.adapters)


def mean(given: Sequence[ClientUpdate], name: str, factor: str) -> torch.Tensor:
    total = sum(update.weight for update in given)
    parts = [u.weight / total * u.adapters[name].tensors()[factor] for u in given]
    return torch.stack(parts).sum(dim=0)


@given(st.integers(3, 9), st.integers(2, 6), st.integers(0, 10**6))
def test_clusters_are_those_of_the_naive_algorithm(clients: int, most: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, clients)
    adapters = [adapter(int(kind), seed + i, scale=rng.uniform(0.1, 2)) for i, kind in enumerate(kinds)]
    found = cluster(distances(adapters), most)
    ours = {frozenset(np.flatnonzero(np.array(found) == number)) for number in set(found)}
    naive = oracles.clusters([[a[name].B.numpy() for name in LAYERS] for a in adapters], most)
    assert ours == {frozenset(part) for part in naive}


def test_clients_go_on_from_the_mean_of_their_cluster_alone() -> None:
    kinds = {0: 7, 1: 8, 2: 7, 3: 8, 4: 7}
    state, given = start(), updates(kinds)
    after, _ = RULE.aggregate(state, given)
    for partition, kind in kinds.items():
        peers = [u for u in given if kinds[u.partition_id] == kind]
        for name, factors in begins(RULE, after, partition).items():
            torch.testing.assert_close(factors.A, mean(peers, name, "A"))
            torch.testing.assert_close(factors.B, mean(peers, name, "B"))
    second = [u for u in updates(kinds, turn=50) if u.partition_id != 3]
    later, _ = RULE.aggregate(after, second)
    torch.testing.assert_close(
        begins(RULE, later, 3)["q"].B, second[1].adapters["q"].tensors()["B"]
    )  # 1 alone replied
    sevens = [u for u in second if kinds[u.partition_id] == 7]
    torch.testing.assert_close(begins(RULE, later, 0)["q"].A, mean(sevens, "q", "A"))
    only, _ = RULE.aggregate(later, second[:1])
    assert torch.equal(begins(RULE, only, 1)["v"].A, begins(RULE, later, 1)["v"].A), "nobody of it replied"


def test_who_is_in_a_cluster_stays_in_it() -> None:
    """Whatever its B looks like later: client 0 then sends what those of the other cluster do."""
    after, _ = RULE.aggregate(start(), updates({0: 7, 1: 8, 2: 7, 3: 8}))
    later, _ = RULE.aggregate(after, updates({0: 8, 1: 8, 2: 7, 3: 8}))
    assert torch.equal(begins(RULE, later, 0)["q"].B, begins(RULE, later, 2)["q"].B)
    assert not torch.equal(begins(RULE, later, 0)["q"].B, begins(RULE, later, 1)["q"].B)


def test_until_the_warm_up_is_over_each_goes_on_from_its_own() -> None:
    rule = make_rule("clustered", {"warmup_rounds": 2})
    assert isinstance(rule, ClusteredRule)
    kinds = {0: 7, 1: 8, 2: 7, 3: 8}
    given = updates(kinds)
    after, _ = rule.aggregate(start(rule), given)
    for update in given:
        assert torch.equal(
            begins(rule, after, update.partition_id)["q"].B, update.adapters["q"].tensors()["B"]
        )
    second = updates(kinds, turn=50)[:3]  # client 3 sits out, its adapter is that of round 1
    later, _ = rule.aggregate(after, second)
    assert torch.equal(begins(rule, later, 1)["q"].B, begins(rule, later, 3)["q"].B)
    assert not torch.equal(begins(rule, later, 1)["q"].B, begins(rule, later, 0)["q"].B)
    joined = (2 * second[1].adapters["q"].tensors()["B"] + 1 * given[3].adapters["q"].tensors()["B"]) / 3
    torch.testing.assert_close(begins(rule, later, 1)["q"].B, joined)


def test_who_comes_late_begins_from_the_mean_and_joins_the_nearest() -> None:
    kinds = {0: 7, 1: 8, 2: 7, 3: 8}
    given = updates(kinds)
    after, _ = RULE.aggregate(start(), given)
    torch.testing.assert_close(begins(RULE, after, 9)["q"].B, mean(given, "q", "B"))
    late = updates({9: 8})
    later, _ = RULE.aggregate(after, late)
    assert torch.equal(begins(RULE, later, 9)["q"].B, begins(RULE, later, 3)["q"].B)
    assert not torch.equal(begins(RULE, later, 9)["q"].B, begins(RULE, later, 0)["q"].B)


@pytest.mark.parametrize("clients", [1, 2])
def test_two_clients_are_one_cluster(clients: int) -> None:
    given = updates(dict(enumerate((7, 8)[:clients])))
    after, _ = RULE.aggregate(start(), given)
    for update in given:
        torch.testing.assert_close(begins(RULE, after, update.partition_id)["q"].B, mean(given, "q", "B"))


def test_equal_clients_are_one_cluster() -> None:
    """Of the last bits of their norms there is no clustering, and no negative distance."""
    same = [adapter(7, 1)] * 5
    assert cluster(distances(same), 4) == [0] * 5
    assert not distances(
        [{n: LoraFactors(f.A, k * f.B, 2.0) for n, f in same[0].items()} for k in (1, 3, 7)]
    ).any()


def test_products_count_whatever_scaling_a_client_has() -> None:
    plain, given = updates({0: 7, 1: 8, 2: 7}), []
    for update in plain:
        scaled = {n: LoraFactors(f.A, f.B / 3, 6.0) for n, f in lora_set(update.adapters).items()}
        given.append(replace(update, adapters=scaled))
    one, other = (RULE.aggregate(start(), u)[0] for u in (plain, given))
    for partition in range(3):
        torch.testing.assert_close(begins(RULE, one, partition)["v"].B, begins(RULE, other, partition)["v"].B)


def test_options_are_checked() -> None:
    for option, least in (("warmup_rounds", 1), ("most_clusters", 2)):
        with pytest.raises(ConfigError, match=f"strategy.options {option} = .*: must be >= {least}"):
            make_rule("clustered", {option: least - 1})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"secure.mode": "sums"}, "clustered"),
        ({"lora.personal-rank": 2}, "clients keep an adapter of their own of clustered already"),
        ({"strategy.allocation": "random-layers"}, "clustered tells clients apart by the B of all layers"),
        ({"lora.ranks": "2,4"}, "clustered needs equal ranks"),
        ({"strategy.server-optimizer": "fedadam"}, "the aggregate of clustered is no mean"),
        ({"lora.method": "vera"}, "clustered"),
        ({"devices.buffer-size": 2}, "needs rounds that wait"),
        ({"privacy.mode": "client", "privacy.noise-multiplier": 1.0}, "clustered"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_needs_one_adapter_or_a_mean_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, NotApplicable), match=said) as refused:
        check(tiny_config(**{"strategy.name": "clustered", **keys}))
    assert "\n" not in str(refused.value)


def test_a_run_measures_and_exports_each_clients_own(tmp_path: Path, cache: Path) -> None:
    """Resumed with the same bits; clients of one cluster end with one file, others with another."""
    keys = {"strategy.name": "clustered", "train.local-steps": 6, "engine.cohort-size": 4}
    found = simulate(tiny_config(**keys), tmp_path / "whole")
    assert sorted(found["accuracy_by_client"]) == ["0", "1", "2", "3"]
    assert read_rounds(tmp_path / "whole")[-1]["bytes_up"] == read_rounds(tmp_path / "whole")[0]["bytes_up"]
    files = {
        p: (tmp_path / "whole" / "adapters" / f"client-{p}" / "adapter_model.safetensors").read_bytes()
        for p in range(4)
    }
    assert 1 < len(set(files.values())) < 4
    simulate(tiny_config(**{**keys, "num-server-rounds": 2}), tmp_path / "cut")
    again = simulate(tiny_config(**keys), tmp_path / "cut", resume=True)
    assert again["accuracy_by_client"] == found["accuracy_by_client"]
    for p, content in files.items():
        path = tmp_path / "cut" / "adapters" / f"client-{p}" / "adapter_model.safetensors"
        assert path.read_bytes() == content
