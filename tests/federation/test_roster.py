"""Nodes that join, leave, return under another id, say nothing or claim what another holds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import RunFailed
from strategies.nodes import NodeDirectory
from tests.federation.fake_grid import FakeGrid


def grid_of(nodes: Mapping[int, object]) -> FakeGrid:
    """Nodes by id, each with what it answers to the query; None for an app without a query function."""

    def client(message: Message, partition: int) -> Message:
        answer = nodes[message.metadata.dst_node_id]
        if answer is None:
            raise ValueError("No `query` function registered")
        return Message(RecordDict({"config": ConfigRecord({"partition-id": answer})}), reply_to=message)

    grid = FakeGrid([], client, tells_partitions=False)
    grid.nodes = dict.fromkeys(nodes, 0)
    return grid


def refreshed(node_directory: NodeDirectory, nodes: Mapping[int, object]) -> dict[int, int]:
    return node_directory.refresh(grid_of(nodes), 1, timeout=0.0)


def test_silent_nodes_that_join_late_or_return_under_another_id_take_part() -> None:
    node_directory = NodeDirectory()
    assert refreshed(node_directory, {70: None, 50: None}) == {0: 50, 1: 70}
    assert refreshed(node_directory, {70: None, 50: None, 10: None}) == {0: 50, 1: 70, 2: 10}
    assert refreshed(node_directory, {50: None}) == {0: 50}
    assert refreshed(node_directory, {50: None, 70: None, 33: None}) == {0: 50, 1: 70, 3: 33}


def test_a_node_that_says_its_partition_keeps_it_under_another_id() -> None:
    node_directory = NodeDirectory()
    assert refreshed(node_directory, {50: 3, 70: 1}) == {1: 70, 3: 50}
    assert refreshed(node_directory, {51: 3, 70: 1}) == {1: 70, 3: 51}


def test_of_two_nodes_with_one_partition_both_take_part_where_anybody_may() -> None:
    node_directory = NodeDirectory()
    both = {0: 50, 1: 70}
    assert refreshed(node_directory, {50: 0, 70: 0}) == both
    assert refreshed(node_directory, {50: 0, 70: 0}) == both
    assert refreshed(node_directory, {50: 0, 70: 0, 90: 1}) == {**both, 2: 90}


def test_silent_nodes_are_numbered_beside_those_that_answer() -> None:
    assert refreshed(NodeDirectory(), {50: 4, 70: None, 60: None}) == {4: 50, 5: 60, 6: 70}


@pytest.mark.parametrize("answer", [True, -1, "2", 1.0], ids=repr)
def test_an_answer_that_is_no_partition_counts_as_none(answer: object) -> None:
    assert refreshed(NodeDirectory(), {50: answer, 70: 7}) == {7: 70, 8: 50}


class TestClosed:
    """Partitions are a fixed list, as in fedlora's own runs: no number is given to whom it is not."""

    def test_a_node_whose_answer_is_lost_is_not_taken_for_another_one(self) -> None:
        node_directory = NodeDirectory(closed=True)
        assert refreshed(node_directory, {50: 0, 70: None}) == {0: 50}
        assert refreshed(node_directory, {50: 0, 70: 1}) == {0: 50, 1: 70}

    def test_who_is_there_keeps_its_partition_until_it_leaves(self) -> None:
        """A node that restarts is listed under both ids for a while."""
        node_directory = NodeDirectory(closed=True)
        assert refreshed(node_directory, {50: 0}) == {0: 50}
        assert refreshed(node_directory, {50: 0, 40: 0}) == {0: 50}
        assert refreshed(node_directory, {40: 0}) == {0: 40}

    def test_two_that_come_together_are_refused(self) -> None:
        with pytest.raises(RunFailed, match="two connected nodes claim partition 0"):
            refreshed(NodeDirectory(closed=True), {50: 0, 40: 0})


ANSWERS = st.dictionaries(st.integers(10, 17), st.none() | st.integers(0, 4), min_size=1)


@given(
    ANSWERS.flatmap(
        lambda a: st.tuples(st.just(a), st.lists(st.sets(st.sampled_from(sorted(a)), min_size=1), max_size=6))
    )
)
def test_all_connected_nodes_take_part_and_the_silent_keep_their_numbers(
    drawn: tuple[dict[int, object], list[set[int]]],
) -> None:
    answers, rounds = drawn
    node_directory, numbers = NodeDirectory(), dict[int, int]()
    for nodes in rounds:
        present = refreshed(node_directory, {node: answers[node] for node in nodes})
        assert sorted(present.values()) == sorted(nodes)
        for number, node in present.items():
            assert answers[node] is not None or numbers.setdefault(node, number) == number
