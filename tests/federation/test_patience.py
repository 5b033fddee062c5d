"""A node that hangs costs the run a few deadlines, not one in every round."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Message

from strategies import FedAvg
from strategies.flower import FactorStrategy
from strategies.patience import PAUSE
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import initial_arrays, watched

ROUNDS = 30


class Hanging:
    """Clients of which some are silent in some rounds; ``asked`` is what reached them."""

    def __init__(self, root: Path, silent: dict[int, set[int]]) -> None:
        self.toy, self.silent = ToyClient(root), silent
        self.asked: dict[int, list[int]] = {p: [] for p in range(3)}

    def __call__(self, message: Message, partition: int) -> Message | None:
        number = int(message.content["config"]["server-round"])
        self.asked[partition].append(number)
        return None if number in self.silent.get(partition, set()) else self.toy(message, partition)


def carried_out(clients: Hanging, **options: int) -> tuple[FactorStrategy, list[dict[int, str]]]:
    strategy = FedAvg(scaling=2.0, fraction_evaluate=0.0, **options)  # type: ignore[arg-type]
    reports = watched(strategy)
    strategy.start(FakeGrid(range(3), clients), initial_arrays(), num_rounds=ROUNDS)
    return strategy, [report.refused for report in reports]


def test_a_node_that_hangs_is_set_aside_and_asked_again_later(tmp_path: Path) -> None:
    clients = Hanging(tmp_path, {1: set(range(3, ROUNDS))})
    _, refused = carried_out(clients, max_missed_rounds=2)
    again = [4 + PAUSE + 1, 4 + 2 * (PAUSE + 1)]
    assert clients.asked[1] == [1, 2, 3, 4, *again]
    assert refused[2] == {1: "no reply before the deadline"}
    told = "set aside until round 15: no reply before the deadline in 2 rounds that asked it"
    assert refused[4] == refused[13] == {1: told}
    assert clients.asked[0] == list(range(1, ROUNDS + 1))


def test_who_answers_again_takes_part_as_before(tmp_path: Path) -> None:
    clients = Hanging(tmp_path, {1: {3, 4, 20}, 2: {2, 4}})
    carried_out(clients, max_missed_rounds=2)
    left_out = set(range(1, ROUNDS + 1)) - set(clients.asked[1])
    assert left_out == set(range(5, 5 + PAUSE)), "and one missed round later on is not two in a row"
    assert clients.asked[2] == list(range(1, ROUNDS + 1)), "two rounds that are not in a row"


def test_nobody_is_set_aside_where_all_are_needed(tmp_path: Path) -> None:
    clients = Hanging(tmp_path, {})
    strategy = FedAvg(scaling=2.0, fraction_evaluate=0.0, max_missed_rounds=1, min_train_nodes=3)
    strategy.patience.note(1, {p: p == 1 for p in range(3)})
    strategy.start(FakeGrid(range(3), clients), initial_arrays(), num_rounds=3)
    assert clients.asked[1] == [1, 2, 3]


def test_with_no_limit_everybody_is_waited_for_in_every_round(tmp_path: Path) -> None:
    clients = Hanging(tmp_path, {1: set(range(3, ROUNDS))})
    carried_out(clients)
    assert clients.asked[1] == list(range(1, ROUNDS + 1))


def test_who_hangs_in_training_is_not_waited_for_in_the_evaluation(tmp_path: Path) -> None:
    clients = Hanging(tmp_path, {1: {1}})
    strategy = FedAvg(scaling=2.0, fraction_evaluate=None, max_missed_rounds=2)
    strategy.start(FakeGrid(range(3), clients), initial_arrays(), num_rounds=1)
    assert (clients.asked[0], clients.asked[1]) == ([1, 1], [1])
