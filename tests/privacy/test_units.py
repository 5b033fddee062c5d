"""`privacy.unit-column`: from a column of the data to rate, ledger and replies; what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients import owner
from clients.budget import plan_release
from clients.ledger_ref import LedgerRef, fingerprint, say_spread, warn_of_spread
from clients.node_settings import node_settings
from clients.privacy import mechanism_of
from clients.runtime import RuntimeCache
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, LedgerRefused, OwnDataRefused
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.prepared.node_data import own_data
from fedlora.privacy.ledger import read_ledgers
from fedlora.server.preview import preview
from tests.conftest import tiny_config
from tests.deployment.test_own_data import own
from tests.in_process import client_runtime

WORDS = ["good", "bad", "fine", "poor", "odd"]
ROWS = [
    {"text": f"{WORDS[i % 5]} film of number {i}", "label": i % 2, "author": f"a{i * i % 11}", "place": i % 2}
    for i in range(40)
]
PRIVATE: dict[str, Any] = {
    "privacy.mode": "example", "privacy.accountant": "rdp", "train.batch-size": 2,
    "data.partition-by": "place", "privacy.unit-column": "author",
}  # fmt: skip


def config(path: Path, rows: list[dict[str, Any]] = ROWS, **keys: Any) -> RunConfig:
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_config(**{"data.name": str(path / "rows.jsonl"), **PRIVATE, **keys})


def prepared(config: RunConfig) -> Prepared:
    return open_prepared(prepare(config))


def test_runs_of_other_units_share_no_data(tmp_path: Path, cache: Path) -> None:
    """One process takes several runs one after the other, and each counts by its own column."""
    runtimes, counted = RuntimeCache(), []
    rows = [{**row, "doctor": f"d{i % 3}"} for i, row in enumerate(ROWS)]
    for column in ("author", "doctor", "", "author"):
        data = runtimes.get(config(tmp_path, rows, **{"privacy.unit-column": column})).data
        counted.append(data.num_protected(0))
    assert counted == [counted[0], 3, 14, counted[0]]  # 14 of the place's 20 rows are to train
    assert counted[0] not in (3, 14)


def test_what_a_run_shows_beforehand_counts_units(tmp_path: Path, cache: Path) -> None:
    declared = {"privacy.neighboring-relation": "add_or_remove_one", "privacy.declared-examples": 15}
    shown = str(preview(config(tmp_path, **declared)).lines())
    assert "unit level, epsilon" in shown


def test_examples_know_whose_they_are_and_are_else_the_same(tmp_path: Path, cache: Path) -> None:
    data, plain = (prepared(config(tmp_path, **{"privacy.unit-column": c})) for c in ("author", ""))
    assert plain.train.units is None
    assert data.train.units is not None
    np.testing.assert_array_equal(data.train.tokens, plain.train.tokens)
    np.testing.assert_array_equal(data.flat, plain.flat)
    for partition in (0, 1):
        whose = data.train.units[data.indices(partition)]
        assert data.num_protected(partition) == len(set(whose.tolist())) < plain.num_protected(partition)
    assert fingerprint(data.train, data.indices(0)) != fingerprint(plain.train, plain.indices(0))


def test_each_row_may_be_a_unit(tmp_path: Path, cache: Path) -> None:
    data = prepared(config(tmp_path, **{"privacy.unit-column": ":row"}))
    assert data.num_protected(0) == len(data.indices(0))


def test_a_block_of_text_is_of_one_unit(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": f"{word} " * (3 + i), "author": i % 3} for i, word in enumerate(WORDS * 4)]
    keys = {"task": "causal-lm", "model.name": "tiny-lm", "data.partitioner": "iid", "data.num-partitions": 1}
    data = prepared(config(tmp_path, rows, **keys, **{"data.max-length": 8}))
    assert data.num_protected(0) == 3
    assert len(data.train) > 3


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such column": ({"privacy.unit-column": "writer"}, r"privacy.unit-column = 'writer': no such column"),
    "client level": ({"privacy.mode": "client"}, r"privacy.unit-column = 'author': must be empty where"),
    "ghost": ({"privacy.grad-sample-mode": "ghost"}, r"privacy.grad-sample-mode = 'ghost': must be 'hooks'"),
    "no room for a unit": (
        {"privacy.max-physical-batch-size": 8}, r"max-physical-batch-size = 8: must be 0 or at least .* 16",
    ),
    "more units than there are": ({"train.batch-size": 12}, r"train.batch-size = 12: .* or units where"),
    "none at all": ({"privacy.max-unit-examples": 0}, r"privacy.max-unit-examples = 0: must be > 0"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "words"), MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_is_refused_in_one_line(
    keys: dict[str, Any], words: str, tmp_path: Path, cache: Path
) -> None:
    def attempt() -> None:
        wrong = config(tmp_path, **keys)
        mechanism_of(wrong).check_data(prepared(wrong), [0, 1])

    with pytest.raises(ConfigError, match=words) as refused:
        attempt()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [None, ""])
def test_a_row_of_nobody_is_refused(value: Any, tmp_path: Path, cache: Path) -> None:
    rows = [*ROWS[:7], {**ROWS[7], "author": value}, *ROWS[8:]]
    with pytest.raises(ConfigError, match=r"privacy\.unit-column = 'author'.*row 8"):
        prepared(config(tmp_path, rows))


def test_pictures_have_no_units(cache: Path) -> None:
    pictures = tiny_config(
        **{"task": "image-classification", "data.name": "digits", "privacy.unit-column": "author",
           "privacy.mode": "example", "model.name": "tiny-vit"}
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"privacy\.unit-column = 'author': task = 'image-classification'"):
        prepare(pictures)


def test_it_says_where_units_have_examples_at_several_clients(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say_spread.cache_clear()
    wide = config(tmp_path)
    with caplog.at_level(logging.WARNING, "fedlora"):
        warn_of_spread(wide, prepared(wide), [0, 1])
    assert "'author': " in caplog.text
    assert "units have examples at several clients (up to 2)" in caplog.text
    caplog.clear()
    say_spread.cache_clear()
    apart = config(tmp_path, [{**row, "place": row["author"]} for row in ROWS], **{"train.batch-size": 1})
    warn_of_spread(apart, prepared(apart), range(4))
    assert not caplog.text


def release(config: RunConfig, ledger: Path, server_round: int = 1) -> Any:
    runtime = client_runtime(config)
    return plan_release(
        runtime, config, LedgerRef(directory=ledger, run_key="run"), partition_id=0,
        server_round=server_round, local_steps=2, seed=1,
    )  # fmt: skip


def test_rate_and_claim_go_by_units(tmp_path: Path, cache: Path) -> None:
    wanted = config(tmp_path)
    plan = release(wanted, tmp_path / "ledger")
    assert plan.release.sample_rate == 2 / prepared(wanted).num_protected(0)
    assert plan.mechanism.unit_examples == 16
    spent = plan.reserve()
    assert spent.granularity == "unit"
    (file,) = (f for f in (tmp_path / "ledger").glob("*.jsonl") if f.name != "datasets.jsonl")
    assert json.loads(file.read_text().splitlines()[1])["unit"] == "author"
    assert len(read_ledgers(tmp_path / "ledger")) == 1


@pytest.mark.parametrize("other", ["", ":row"])
def test_one_ledger_is_of_one_kind_of_unit(other: str, tmp_path: Path, cache: Path) -> None:
    release(config(tmp_path), tmp_path / "ledger").reserve()
    later = release(config(tmp_path, **{"privacy.unit-column": other}), tmp_path / "ledger", 2)
    with pytest.raises(LedgerRefused, match=rf"privacy\.unit-column = '{other}': .* releases for 'author'"):
        later.reserve()
    with pytest.raises(LedgerRefused, match=r"releases for 'author'"):
        later.ledger.check(unit=other)


# A node's own data


def test_own_examples_know_whose_they_are(tmp_path: Path, cache: Path) -> None:
    rows = [{**row, "label": ("neg", "pos")[row["label"]], "who": row["author"]} for row in ROWS]
    mine = own_data(own(tmp_path, rows, unit_column="who"), "tiny", 64)
    assert mine.num_protected(1) == len({row["author"] for row in ROWS})
    assert own_data(own(tmp_path, rows), "tiny", 64).num_protected(1) == 40
    with pytest.raises(OwnDataRefused, match=r"^unit-column = 'author': .*'' in row 1|^unit-column.*row 1"):
        own_data(own(tmp_path, [{**rows[0], "who": ""}, *rows[1:]], unit_column="who"), "tiny", 64)


def test_owner_and_run_agree_on_units(tmp_path: Path) -> None:
    node = {"partition-id": 0, "data": "/a.jsonl", "dataset-id": "mine"}
    people, rows = (node_settings({**node, "unit-column": column}) for column in ("who", ""))
    asked, plain = config(tmp_path), config(tmp_path, **{"privacy.unit-column": ""})
    assert owner.in_owners_name(asked, people, simulation=False).privacy.unit_column == "who"
    for run, settings in ((asked, rows), (plain, people)):
        with pytest.raises(ConfigError, match=r"privacy\.unit-column = '.*': the owner of this node has"):
            owner.in_owners_name(run, settings, simulation=False)
    with pytest.raises(ConfigError, match=r"unit-column = 'who': names a column of data"):
        node_settings({"partition-id": 0, "unit-column": "who"})
