from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.assets.fetch import cache_dir
from fedlora.config import RunConfig, from_flat
from fedlora.data.built_in_tokenizers import TinyTokenizer
from fedlora.data.sources import load_examples
from fedlora.errors import ConfigError
from fedlora.prepared import cache as module
from fedlora.prepared.cache import open_prepared, prepare

TINY = {"model.name": "tiny", "data.name": "synthetic"}


def config(**values: Any) -> RunConfig:
    return from_flat({**TINY, **{key.replace("__", ".").replace("_", "-"): v for key, v in values.items()}})


class Broken(TinyTokenizer):
    """Fails after the first batch of texts."""

    calls = 0

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> tuple[Sequence[Sequence[int]], None]:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("power cut")
        return super().encode(texts, pairs, max_length)


def directories() -> list[str]:
    return sorted(str(path.relative_to(cache_dir())) for path in cache_dir().rglob("*") if path.is_dir())


def test_what_was_loaded_comes_back() -> None:
    wanted = config(data__max_length=10)
    data, raw = open_prepared(prepare(wanted)), load_examples(wanted.data)
    assert data.label_names == raw.label_names
    assert data.num_labels == len(raw.label_names)
    for examples, table in ((data.train, raw.train), (data.test, raw.test)):
        ids, _ = TinyTokenizer().encode(table["text"][:], None, 10)
        assert [examples.input_ids(i).tolist() for i in range(len(examples))] == list(ids)
        assert examples.lengths.tolist() == [len(row) for row in ids]
        assert examples.lengths.max() == 10
        assert examples.labels.tolist() == table["label"][:]
        assert [data.domain_names[d] for d in examples.domains] == table["domain"][:]


def test_partitions_are_those_of_the_partitioner() -> None:
    data = open_prepared(prepare(config()))
    assert data.num_partitions == 4
    domains = [set(data.train.domains[data.indices(i)].tolist()) for i in range(4)]
    assert domains == [{0}, {1}, {2}, {3}]
    assert sum(len(data.indices(i)) for i in range(4)) == len(data.train)
    for wrong in (-1, 4):
        with pytest.raises(ConfigError, match="there are partitions 0 to 3"):
            data.indices(wrong)


def test_seeds_share_the_examples_not_the_partitions() -> None:
    paths = [
        prepare(config(seed=seed, data__partitioner="iid", data__num_partitions=3)) for seed in (1, 1, 2)
    ]
    assert paths[0] == paths[1] != paths[2]
    assert paths[0].parent == paths[2].parent
    first, _, other = (open_prepared(path) for path in paths)
    assert not np.array_equal(first.indices(0), other.indices(0))


def test_a_second_time_nothing_is_tokenised() -> None:
    path = prepare(config())
    assert prepare(config(), Broken()) == path


@pytest.mark.parametrize(
    "change",
    [{"data__max_length": 9}, {"data__test_fraction": 0.5}, {"data__name": "other.jsonl"}],
)
def test_what_changes_the_examples_changes_the_place(change: dict[str, Any]) -> None:
    def key(wanted: RunConfig) -> str:
        return module._token_key(wanted.data, TinyTokenizer())

    assert key(config()) != key(config(**change))


def test_what_does_not_change_the_examples_shares_them() -> None:
    changes: list[dict[str, Any]] = [
        {"data__evaluate_examples": 7},
        {"data__partitioner": "iid", "data__num_partitions": 3},
        {"lora__rank": 2},
    ]
    homes = {prepare(config(**change)).parent for change in changes}
    assert homes == {prepare(config()).parent}


def test_another_tokenizer_has_another_place() -> None:
    class Other(TinyTokenizer):
        identity = "other"

    assert prepare(config()).parent != prepare(config(), Other()).parent


def test_a_changed_file_is_prepared_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"text": f"text {i}", "label": i % 2, "shop": i % 3} for i in range(20)]

    def written(rows: list[dict[str, Any]]) -> Path:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare(config(data__name=str(file), data__partition_by="shop"))

    first, second = written(rows), written([*rows, *({**row, "text": f"more {row['text']}"} for row in rows)])
    sizes = [len(data.train) + len(data.test) for data in map(open_prepared, (first, second))]
    assert sizes == [20, 40]
    assert open_prepared(first).num_partitions == 3
    assert open_prepared(first).domain_names == ()
    assert set(open_prepared(first).train.domains.tolist()) == {-1}


def test_a_crash_in_the_middle_leaves_nothing() -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        prepare(config(), Broken())
    assert directories() == ["prepared"]
    assert len(open_prepared(prepare(config())).train) > 0


def test_a_refused_partitioning_leaves_the_examples_only() -> None:
    with pytest.raises(ConfigError, match="min-partition-size"):
        prepare(config(data__min_partition_size=10_000))
    home = prepare(config()).parent
    assert sorted(path.suffix for path in home.iterdir() if path.is_file() and path.suffix != ".lock") == [
        ".arrow", ".arrow", ".json",
    ]  # fmt: skip
    assert len([path for path in home.iterdir() if path.is_dir()]) == 1


def test_texts_without_tokens_are_refused() -> None:
    class Empty(TinyTokenizer):
        def encode(
            self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
        ) -> tuple[Sequence[Sequence[int]], None]:
            return [[] for _ in texts], None

    with pytest.raises(ConfigError, match="has no token"):
        prepare(config(), Empty())


def test_nothing_prepared_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prepared data"):
        open_prepared(tmp_path)


def test_opening_imports_no_framework_and_maps_the_file() -> None:
    path = prepare(config())
    code = (
        "import sys\n"
        "from fedlora.prepared.cache import open_prepared\n"
        "from fedlora.data.examples import collate\n"
        f"data = open_prepared({str(path)!r})\n"
        "collate(data.train, data.indices(0)[:4], data.pad_token_id)\n"
        "print(*[m for m in ('datasets', 'transformers', 'flwr_datasets', 'pandas') if m in sys.modules])\n"
        "print(data.train.tokens.flags.owndata, data.train.labels.flags.owndata)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "False False"]


def test_finding_it_again_imports_no_framework() -> None:
    prepare(config())
    code = (
        "import sys\n"
        "from fedlora.config import from_flat\n"
        "from fedlora.prepared.cache import prepare\n"
        f"prepare(from_flat({TINY!r}))\n"
        "print(*[m for m in ('datasets', 'transformers', 'flwr_datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_one_plain_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config())
    assert capsys.readouterr().err.splitlines() == [
        "encoding 512 train examples of synthetic",
        "encoding 128 test examples of synthetic",
    ]


def test_prepared_is_frozen() -> None:
    data = open_prepared(prepare(config()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.pad_token_id = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        data.train.tokens[0] = 1
