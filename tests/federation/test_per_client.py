"""Figures of single clients, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from clients.evaluation import Evaluation
from clients.execute_evaluation import own_test_indices
from fedlora.data.examples import Examples
from fedlora.prepared.cache import Prepared
from fedlora.server.records import accuracy_by_client, spread, worst_decile


def examples(domains: list[int]) -> Examples:
    count = len(domains)
    return Examples(
        tokens=np.zeros(count, dtype=np.int32),
        offsets=np.arange(count + 1),
        labels=np.zeros(count, dtype=np.int64),
        domains=np.array(domains, dtype=np.int32),
    )


def prepared(train: list[list[int]], test: list[int], names: tuple[str, ...] = ("a", "b", "c")) -> Prepared:
    """``train`` has the domains of each client's examples."""
    return Prepared(
        train=examples([d for client in train for d in client]),
        test=examples(test),
        label_names=("no", "yes"),
        domain_names=names,
        pad_token_id=0,
        flat=np.arange(sum(map(len, train))),
        offsets=np.cumsum([0, *map(len, train)]),
    )


def outcome(data: Prepared, right: list[int], units: list[int] | None = None) -> Evaluation:
    count = len(data.test)
    return Evaluation(
        indices=np.arange(count),
        losses=np.zeros(count, dtype=np.float32),
        units=np.array(units or [1] * count),
        right=np.array(right),
        domains=data.test.domains.astype(np.int64),
    )


def test_each_client_is_measured_on_the_domains_that_it_holds() -> None:
    data = prepared([[0, 0], [1, 2, 1], [2]], test=[0, 1, 2, 0, 2, 2])
    measured = outcome(data, right=[1, 0, 3, 0, 1, 0], units=[1, 1, 4, 2, 1, 1])
    found = accuracy_by_client(measured, data, range(3), "natural")
    assert found == {"0": 1 / 3, "1": 4 / 7, "2": 4 / 6}
    for client, accuracy in found.items():
        assert accuracy == measured.among(own_test_indices(data, int(client))).accuracy


def test_a_client_whose_domains_have_no_test_example_is_left_out() -> None:
    data = prepared([[0], [1]], test=[0, 0, 2])
    assert accuracy_by_client(outcome(data, [1, 0, 1]), data, range(2), "natural") == {"0": 0.5}


@pytest.mark.parametrize(
    ("train", "names", "partitioner"),
    [
        ([[0], [1]], ("a", "b"), "dirichlet"),
        ([[0, 1], [1, 0]], ("a", "b"), "natural-dirichlet"),
        ([[0, 1], [1, 0]], ("a", "b"), "natural"),
        ([[-1], [-1]], (), "natural"),
    ],
    ids=["dealt by label", "skewed inside of one domain", "all hold all", "no domains"],
)
def test_nothing_is_invented(train: list[list[int]], names: tuple[str, ...], partitioner: str) -> None:
    data = prepared(train, test=[0, 1] if names else [-1, -1], names=names)
    assert accuracy_by_client(outcome(data, [1, 0]), data, range(2), partitioner) is None
    nothing = {"accuracy_by_client": None, "accuracy_worst_decile": None, "accuracy_worst_client": None}
    assert spread(None) == nothing


@pytest.mark.parametrize(("clients", "counted"), [(1, 1), (10, 1), (11, 2), (20, 2), (101, 11)])
def test_the_worst_decile_is_a_tenth_rounded_up(clients: int, counted: int) -> None:
    accuracies = np.random.default_rng(0).permutation(clients) / clients
    assert worst_decile(accuracies.tolist()) == pytest.approx(np.arange(counted).mean() / clients)


def test_the_spread_names_all_and_the_worst() -> None:
    found = spread({"0": 0.5, "1": 0.75})
    assert found == {
        "accuracy_by_client": {"0": 0.5, "1": 0.75},
        "accuracy_worst_decile": 0.5,
        "accuracy_worst_client": 0.5,
    }
