"""A client that loses all its examples keeps its number: nobody inherits its rank, group or ledger."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from clients.execute import train_instruction
from clients.node import Node
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.server.progress import RoundProgress
from tests.conftest import tiny_config
from tests.federation.fake_grid import FakeGrid
from tests.in_process import client_runtime, federated

CUT = "no example of 'b' has anything to learn within data.max-length = 64"
HELD = "all examples of 'b' are held out for evaluation"


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talks(path: Path, **keys: Any) -> RunConfig:
    """Conversations of three clients; those of ``b`` are cut away before the answer."""
    rows = [
        {
            "prompt": ("word " * 300 if i % 3 == 1 else "Say ") + str(i),
            "response": f"{i}",
            "who": "abc"[i % 3],
        }
        for i in range(30)
    ]
    config = {
        "task": "instruction", "model.name": "tiny-lm", "data.name": written(path / "talks.jsonl", rows),
        "data.partition-by": "who", "strategy.name": "flora", "lora.ranks": "2,4,8", "num-server-rounds": 1,
        "train.local-steps": 1, "engine.device": "cpu",
    }  # fmt: skip
    return tiny_config(**{**config, **keys})


def texts(path: Path, **keys: Any) -> RunConfig:
    """Texts of three clients; all of ``b`` are one text, a third of the rows, so that they are held out."""
    texts = ("all of these are one", "and these are another")
    rows = [{"text": texts[i % 3 == 1], "label": i // 3 % 2, "who": "abc"[i % 3]} for i in range(60)]
    config = {"data.name": written(path / "texts.jsonl", rows), "data.partition-by": "who"}
    return tiny_config(**{**config, "data.test-fraction": 0.34, **keys})


def opened(config: RunConfig) -> Prepared:
    with pytest.warns(UserWarning, match="are left out"):
        return open_prepared(prepare(config))


def test_a_client_whose_examples_are_cut_away_keeps_its_number(tmp_path: Path, cache: Path) -> None:
    data = opened(talks(tmp_path))
    assert data.num_partitions == 3
    assert data.left_out == {1: CUT}
    assert data.clients == (0, 2)
    assert [len(data.indices(p)) > 0 for p in range(3)] == [True, False, True]


def test_with_as_many_clients_as_values_none_is_dealt_anew(tmp_path: Path, cache: Path) -> None:
    natural = opened(talks(tmp_path))
    asked = open_prepared(prepare(talks(tmp_path, **{"data.num-partitions": 3})))
    assert asked.left_out == {1: CUT}
    assert [asked.indices(p).tolist() for p in range(3)] == [natural.indices(p).tolist() for p in range(3)]
    fewer = open_prepared(prepare(talks(tmp_path, **{"data.num-partitions": 2})))
    assert fewer.left_out == {}
    assert all(len(fewer.indices(p)) for p in range(2))


def test_a_run_leaves_it_out_and_says_so(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="are left out"):
        federation = federated(talks(tmp_path), tmp_path / "run", stores=tmp_path / "clients")
    assert federation.partitions == (0, 2)
    ranks: dict[int, int] = {}

    def client(message: Message, partition: int) -> Message:
        node = Node(partition_id=partition, state_dir=tmp_path / "clients", simulation=True)
        reply = train_instruction(
            federation.runtime, wire.decode_instruction(message.content), federation.config, node
        )
        ranks[partition] = min(min(tensor.shape) for name, tensor in reply.arrays.items() if "lora_A" in name)
        answered = replace(reply, answers=wire.decode_instruction(message.content).identity)
        return Message(wire.encode_reply(answered), reply_to=message)

    result = federation.run(FakeGrid(federation.partitions, client))
    assert ranks == {0: 2, 2: 8}
    record = federation.directory.rounds()[0]
    assert record["participants"] == [0, 2]
    assert record["left_out"] == result["left_out"] == {"1": CUT}
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 10
    with RoundProgress("flora", 1) as progress:
        progress.begin(0, federation.left_out)
    assert f"flora: partition 1 is left out, {CUT}" in capsys.readouterr().err


def test_it_cannot_be_asked_for_and_its_node_says_why(tmp_path: Path, cache: Path) -> None:
    config = talks(tmp_path)
    with (
        pytest.warns(UserWarning, match="are left out"),
        pytest.raises(ConfigError, match=f"partition 1 .*{CUT}"),
    ):
        _ = federated(talks(tmp_path, partitions="0-1"), tmp_path / "run").partitions
    federation = federated(config, tmp_path / "other", stores=tmp_path / "clients")

    def client(message: Message, partition: int) -> Message:
        node = Node(partition_id=1, state_dir=tmp_path / "clients", simulation=True)
        with pytest.raises(ConfigError, match=f"partition-id = 1: {CUT}"):
            train_instruction(client_runtime(config), wire.decode_instruction(message.content), config, node)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run(FakeGrid(federation.partitions, client))


@pytest.mark.parametrize("key", ["data.test-fraction", "data.validation-fraction"])
def test_a_client_whose_examples_are_all_held_out_keeps_its_number(
    key: str, tmp_path: Path, cache: Path
) -> None:
    test = written(tmp_path / "test.jsonl", [{"text": "a test", "label": n, "who": "d"} for n in (0, 1)])
    keys = {} if key == "data.test-fraction" else {"data.validation-fraction": 0.34, "data.test": test}
    data = open_prepared(prepare(texts(tmp_path, **keys)))
    assert data.left_out == {1: HELD}
    assert [len(data.indices(p)) for p in range(data.num_partitions)] == [20, 0, 20]


def test_clients_of_test_examples_alone_have_no_number(tmp_path: Path, cache: Path) -> None:
    test = written(tmp_path / "test.jsonl", [{"text": "a test", "label": n, "who": "aa"} for n in (0, 1)])
    data = open_prepared(prepare(texts(tmp_path, **{"data.test": test})))
    assert data.left_out == {}
    assert [len(data.indices(p)) for p in range(data.num_partitions)] == [20, 20, 20]


def test_a_client_of_several_partitions_keeps_its_place(tmp_path: Path, cache: Path) -> None:
    keys = {"data.partitioner": "natural-dirichlet", "data.num-partitions": 5, "data.dirichlet-alpha": 10.0}
    data = open_prepared(prepare(texts(tmp_path, **keys)))
    assert data.left_out == {2: HELD}
    assert all(len(data.indices(p)) for p in (0, 1, 3, 4))


def test_a_smallest_size_is_for_clients_that_take_part(tmp_path: Path, cache: Path) -> None:
    assert open_prepared(prepare(texts(tmp_path, **{"data.min-partition-size": 20}))).left_out == {1: HELD}
    with pytest.raises(ConfigError, match=r"data\.min-partition-size = 21: partition 0"):
        prepare(texts(tmp_path, **{"data.min-partition-size": 21}))
