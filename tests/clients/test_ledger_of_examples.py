"""What an example is, as a client's ledger has it: a row, a column's values, or what a task cut from rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clients.budget import plan_release
from clients.ledger_ref import LEDGER, LedgerRef, check_ledgers, cut_before_dealt, example_of, ledger_of
from clients.privacy import mechanism_of
from fedlora.config import RunConfig
from fedlora.errors import LedgerRefused
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.prepared.node_data import OwnData
from fedlora.privacy.cut import ROWS, Cut, unlike
from fedlora.privacy.types import PrivacySpent
from fedlora.tasks import TASKS
from tests.conftest import tiny_config
from tests.in_process import client_runtime

BLOCKS: dict[str, Any] = {
    "task": "causal-lm", "model.name": "tiny-lm", "data.partitioner": "iid", "data.num-partitions": 2,
    "privacy.mode": "example", "privacy.noise-multiplier": 1.0, "train.batch-size": 4,
}  # fmt: skip
WHOLE = ("task", "max_length", "tokenizer")


def blocks(length: int, **keys: Any) -> RunConfig:
    return tiny_config(**{**BLOCKS, "data.max-length": length, **keys})


@pytest.fixture(scope="module")
def data(cache: Path) -> Prepared:
    return open_prepared(prepare(blocks(16)))


def settings(cut: Cut | None) -> tuple[str, ...] | None:
    return None if cut is None else tuple(cut.record())


EXAMPLES: list[tuple[str, dict[str, Any], tuple[str, ...] | None]] = [
    ("causal-lm", {}, WHOLE),
    ("causal-lm", {"privacy.unit-column": ":row"}, None),
    ("instruction", {}, ("task", "tokenizer")),
    ("instruction", {"data.assistant-loss": "last"}, ()),
    ("instruction", {"privacy.unit-column": "author"}, None),
    ("dpo", {}, ()),
    ("classification", {}, ()),
    ("classification", {"privacy.unit-column": "author"}, None),
    ("image-classification", {}, ()),
]


@pytest.mark.parametrize(("task", "keys", "by"), EXAMPLES)
def test_what_decides_what_an_example_is(
    task: str, keys: dict[str, Any], by: tuple[str, ...] | None, data: Prepared
) -> None:
    assert settings(example_of(blocks(16, task=task, **keys), data)) == by


@pytest.mark.parametrize("task", TASKS)
def test_who_has_an_example_goes_by_its_row_or_by_what_cut_it(task: str, data: Prepared) -> None:
    config = blocks(16, task=task)
    apart = replace(config.data, partitioner="natural", num_partitions=0)
    assert cut_before_dealt(replace(config, data=apart), data) is None
    gathered = replace(apart, num_partitions=2)
    for dealt in (config, replace(config, data=gathered)):
        by = WHOLE if task in ("causal-lm", "instruction", "dpo") else ()
        assert settings(cut_before_dealt(dealt, data)) == by


def test_another_tokenizer_is_another_cut(data: Prepared) -> None:
    one, other = (example_of(blocks(16), replace(data, reader=name)) for name in ("one", "other"))
    now, before = unlike(one, other) or ("", "")
    assert now.startswith("model.name, tokenizer = ")
    assert now != before


def test_blocks_that_were_dealt_at_another_length_are_refused(tmp_path: Path, cache: Path) -> None:
    """Partition 1 of the one has text of partition 0 of the other."""
    short, long = (blocks(length) for length in (16, 32))
    of = {config: open_prepared(prepare(config)) for config in (short, long)}
    ledger_of(tmp_path, short, of[short], 0).check()
    check_ledgers(short, of[short], [0, 1], tmp_path, {}, "", example_of(short, of[short]))
    with pytest.raises(LedgerRefused, match=r"^data\.max-length = 32: .* by data\.max-length = 16, and what"):
        ledger_of(tmp_path, long, of[long], 1).check()


def test_a_simulation_is_refused_before_it_begins(tmp_path: Path, cache: Path) -> None:
    """Clients by nature keep their texts, and what is spent on their blocks does not add up all the same."""
    apart = {"data.partitioner": "natural", "data.num-partitions": 0}
    short, long = (blocks(length, **apart) for length in (16, 32))
    charged(short, None, tmp_path / LEDGER, 1)
    for config in (short, long):
        data = open_prepared(prepare(config))
        assert ledger_of(tmp_path / LEDGER, config, data, 0).dataset.cut is None
        if config is short:
            mechanism_of(config).check_ledgers(data, [0, 1], tmp_path, {})
            continue
        with pytest.raises(LedgerRefused, match=r"^data\.max-length = 32: .* by data\.max-length = 16; what"):
            mechanism_of(config).check_ledgers(data, [0, 1], tmp_path, {})


def charged(config: RunConfig, own: OwnData | None, ledger: Path, server_round: int) -> PrivacySpent:
    """A release of partition 0, or of a node with data of its own."""
    plan = plan_release(
        client_runtime(config, own), config, LedgerRef(directory=ledger, run_key="run"),
        partition_id=0, server_round=server_round, local_steps=2, seed=None,
    )  # fmt: skip
    return plan.reserve()


def test_a_server_that_chooses_another_length_is_refused_by_the_nodes_ledger(
    tmp_path: Path, cache: Path
) -> None:
    """A block of 256 tokens is 32 blocks of 8, and an epsilon of both holds for neither."""
    rows = [{"text": " ".join(f"word{(7 * i + j) % 50}" for j in range(60))} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = OwnData(
        path=str(tmp_path / "own.jsonl"), label_column="", dataset_id="ward 7", partition_id=0,
        home=tmp_path / "home",
    )  # fmt: skip
    read_by = open_prepared(prepare(blocks(256))).reader
    assert client_runtime(blocks(256), own).data.reader == read_by != ""
    spent = charged(blocks(256), own, tmp_path / "ledger", 1)
    with pytest.raises(LedgerRefused, match=r"^data\.max-length = 8: .* by data\.max-length = 256; what"):
        charged(blocks(8), own, tmp_path / "ledger", 2)
    assert charged(blocks(256), own, tmp_path / "ledger", 2).epsilon > spent.epsilon


def test_another_length_of_what_is_a_row_changes_nothing(tmp_path: Path, cache: Path) -> None:
    for server_round, length in ((1, 16), (2, 32)):
        config = tiny_config(**{
            "data.max-length": length, "privacy.mode": "example", "privacy.noise-multiplier": 1.0,
            "data.partitioner": "iid", "data.num-partitions": 2,
        })  # fmt: skip
        runtime = client_runtime(config)
        plan = plan_release(
            runtime, config, LedgerRef(directory=tmp_path, run_key="run"), partition_id=0,
            server_round=server_round, local_steps=2, seed=None,
        )  # fmt: skip
        assert plan.release.cut == plan.ledger.dataset.cut == ROWS
        assert plan.reserve().releases == server_round
