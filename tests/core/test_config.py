"""The configuration: it reads back what it writes, and refuses in one line with key, value and way out."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import (
    RunConfig,
    as_config,
    flatten,
    from_flat,
    from_keywords,
    int_list,
    name_list,
    to_flat,
)
from fedlora.config.files import read_config
from fedlora.errors import ConfigError

DEFAULTS = to_flat(RunConfig())

changes = st.fixed_dictionaries(
    {},
    optional={
        "num-server-rounds": st.integers(1, 10**6),
        "fraction-train": st.floats(0.001, 1.0),
        "seed": st.integers(0, 2**62),
        "partitions": st.sampled_from(["", "0-3,7", "12"]),
        "client-groups": st.sampled_from(["", '[{"partitions": "0-3", "rank": 4, "local-steps": 5}]']),
        "model.name": st.text(min_size=1),
        "lora.rank": st.integers(1, 512),
        "lora.alpha": st.floats(1e-6, 1e6),
        "lora.use-rslora": st.booleans(),
        "data.partitioner": st.sampled_from(["natural"]),
        "data.test-fraction": st.floats(0.01, 0.99),
        "train.learning-rate": st.floats(1e-9, 10.0),
        "train.optimizer": st.sampled_from(["sgd", "adamw"]),
        "strategy.options": st.sampled_from(["", "{}", '{"lam": 0.1}']),
        "privacy.target-delta": st.floats(1e-12, 0.01),
        "engine.num-gpus": st.sampled_from([0.0, 0.25, 1.0, 8.0]),
    },
)


@given(changed=changes)
def test_what_is_written_reads_back_the_same(changed: dict[str, Any]) -> None:
    config = from_flat(changed)
    flat = to_flat(config)
    assert from_flat(flat) == config
    assert flat == {**DEFAULTS, **changed}
    assert list(flat) == list(DEFAULTS)


def test_no_key_means_the_defaults() -> None:
    assert from_flat({}) == RunConfig()


def test_every_key_is_a_flower_scalar() -> None:
    """Flower's run-config takes booleans, integers, floats and strings only."""
    assert {type(value) for value in DEFAULTS.values()} <= {bool, int, float, str}
    assert all(key == key.lower() and "_" not in key for key in DEFAULTS)


def test_a_whole_number_is_a_number_and_stays_one() -> None:
    config = from_flat({"lora.alpha": 16})
    assert type(config.lora.alpha) is float
    assert config == RunConfig()


def test_nested_tables_become_dotted_keys() -> None:
    nested = {"seed": 1, "lora": {"rank": 4, "deep": {"x": True}}, "name": "a"}
    assert flatten(nested) == {"seed": 1, "lora.rank": 4, "lora.deep.x": True, "name": "a"}


# --- refusals -----------------------------------------------------------------------------------------

ABOVE_ZERO = ("lora.alpha", "train.learning-rate", "privacy.target-epsilon", "privacy.max-grad-norm",
              "round-timeout", "data.dirichlet-alpha")  # fmt: skip
FROM_ONE = ("num-server-rounds", "min-train-nodes", "min-available-nodes", "evaluate-every", "lora.rank",
            "train.local-steps", "train.batch-size", "data.classes-per-partition",
            "data.min-partition-size")  # fmt: skip
FROM_ZERO = ("seed", "train.head-learning-rate", "train.weight-decay", "train.local-epochs",
             "train.max-grad-norm", "train.proximal-mu", "data.num-partitions", "data.evaluate-examples",
             "privacy.noise-multiplier", "privacy.max-participations", "engine.num-actors",
             "engine.max-retries")  # fmt: skip
CHOICES = ("model.pooling", "model.head", "data.partitioner", "train.precision", "privacy.mode",
           "privacy.accountant", "engine.device", "evaluation-precision")  # fmt: skip

BAD: list[tuple[str, Any, str]] = [
    ("lora.ranks", "8-4", "'8-4' is not a whole number or a range"),
    ("partitions", "7-3", "'7-3' is not a whole number or a range"),
    ("strategy.options", '{"init-a": "kaiming"}', "init-a is strategy.init-a"),
    *((key, 0.0 if isinstance(DEFAULTS[key], float) else 0, "must be > 0") for key in ABOVE_ZERO),
    *((key, 0, "must be > 0") for key in FROM_ONE),
    *((key, -1, "must be >= 0") for key in FROM_ZERO),
    *((key, "nonsense", "accepted are") for key in CHOICES),
    ("engine.num-cpus", 0.0, "must be >= 0.0001"),
    ("engine.num-gpus", -1, "must be >= 0 (a share from 0.0001 to 1, or whole GPUs)"),
    ("engine.num-gpus", 1.5, "must be 0, a share from 0.0001 to 1, or whole GPUs"),
    ("fraction-train", 0.0, "must be > 0"),
    ("fraction-train", 1.5, "must be <= 1"),
    ("lora.dropout", 1.0, "must be < 1"),
    ("lora.dropout", -0.1, "must be >= 0"),
    ("train.momentum", 1.0, "must be < 1"),
    ("data.test-fraction", 0.0, "must be > 0"),
    ("data.test-fraction", 1.0, "must be < 1"),
    ("privacy.target-delta", 0.99, "must be <= 0.01"),
    ("privacy.target-delta", 0.0, "must be > 0"),
    ("data.max-length", 7, "must be >= 8"),
    ("data.partitioner", "dirichlet", "needs >= 1"),
    ("model.name", "", "at least 1 character (name a model or a directory)"),
    ("data.name", "", "at least 1 character (name a dataset or a file)"),
    ("lora.ranks", "4,0", "ranks must be >= 1"),
    ("lora.ranks", "4,x", "whole number or a range"),
    ("lora.ranks", "4,-8", "whole number or a range"),
    ("partitions", "0..3", "whole number or a range"),
    ("partitions", "1.5", "whole number or a range"),
    ("study.seeds", "1,two", "whole number or a range"),
    ("study.references", "local-only,central", "accepted are local-only, centralised"),
    ("strategy.options", "{lam: 1}", "not JSON"),
    ("strategy.options", "[1]", "must be a JSON object"),
    ("study.overrides", "3", "must be a JSON object"),
    ("study.variants", '{"a": ', "not JSON"),
    ("client-groups", "{}", "must be a JSON list"),
    ("client-groups", "[3]", "each entry must be an object"),
    ("client-groups", '[{"rank": 4}]', "is missing"),
    (
        "client-groups",
        '[{"partitions": "0", "ranks": 4}]',
        "unknown key (did you mean rank?), accepted are partitions, rank",
    ),
    ("client-groups", '[{"partitions": "0", "rank": 0}]', "must be > 0"),
    ("client-groups", '[{"partitions": "0", "rank": "4"}]', "must be a valid integer"),
    ("client-groups", '[{"partitions": "a-b"}]', "whole number or a range"),
    ("client-groups", '[{"partitions": 3}]', "must be a valid string"),
    ("lora.alpha", float("nan"), "must be a finite number"),
    ("train.learning-rate", float("inf"), "must be a finite number"),
    ("lora.rank", 4.0, "must be a valid integer"),
    ("lora.rank", "4", "must be a valid integer"),
    ("lora.rank", True, "must be a valid integer"),
    ("lora.rank", None, "must be a valid integer"),
    ("lora.alpha", "16", "must be a valid number"),
    ("lora.alpha", True, "must be a valid number"),
    ("lora.use-rslora", 1, "must be a valid boolean"),
    ("model.name", 3, "must be a valid string"),
    ("lora.ranks", 8, "must be a valid string"),
    ("lora.rnk", 4, "did you mean lora.rank?"),
    ("lora.use_rslora", True, "did you mean lora.use-rslora?"),
    ("num_server_rounds", 3, "did you mean num-server-rounds?"),
    ("zzz", 1, "keys look like"),
    ("lora", 4, "unknown key"),
    ("lora.rank.x", 4, "unknown key"),
]


@pytest.mark.parametrize(("key", "value", "way_out"), BAD, ids=lambda v: str(v)[:40])
def test_a_refusal_is_one_line_with_key_value_and_way_out(key: str, value: Any, way_out: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_flat({key: value})
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith((key, "data.num-partitions", "study.references", "client-groups"))
    assert way_out in text, text
    if key not in ("client-groups", "study.references") and (key, value) != ("data.partitioner", "dirichlet"):
        shown = repr(value) if isinstance(value, str) else str(value)
        assert f"{key} = {shown}" in text, text


def test_every_key_has_a_refused_value() -> None:
    """A wrong type at least; so no key is read without being looked at."""
    for key, default in DEFAULTS.items():
        wrong = 1 if isinstance(default, str | bool) else "text"
        with pytest.raises(ConfigError, match=f"^{key} = {wrong!r}: (must be|accepted are) "):
            from_flat({key: wrong})


@pytest.mark.parametrize("value", [None, {1, 2}, [None]], ids=str)
def test_what_flower_cannot_carry_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^lora.ranks = .*(must be|cannot stand)"):
        flatten({"lora": {"ranks": value}})


# --- lists, groups, derived values --------------------------------------------------------------------


@given(numbers=st.lists(st.integers(0, 500), max_size=6))
def test_lists_read_back(numbers: list[int]) -> None:
    assert int_list("k", ",".join(map(str, numbers))) == tuple(numbers)
    assert int_list("k", " , ".join(f"{n}-{n + 2}" for n in numbers)) == tuple(
        n + i for n in numbers for i in range(3)
    )
    assert name_list(" a, ,b ,") == ("a", "b")


def test_a_group_overrides_and_the_rest_keeps() -> None:
    """First group that lists the partition wins; ranks repeat over the partitions."""
    groups = '[{"partitions": "0-1", "rank": 3}, {"partitions": "1,5", "alpha": 2, "local-steps": 7}]'
    config = from_flat({"lora.ranks": "4,8", "lora.alpha": 32.0, "client-groups": groups})
    assert [config.rank_of(k) for k in range(6)] == [3, 3, 4, 8, 4, 8]
    assert [config.alpha_of(k) for k in (0, 1, 5, 6)] == [32.0, 32.0, 2.0, 32.0]
    assert [config.local_steps_of(k) for k in (0, 1, 5, 6)] == [10, 10, 7, 10]
    assert config.group_of(9) is None


def test_scaling_is_alpha_over_rank_or_its_root() -> None:
    assert from_flat({"lora.alpha": 16.0}).lora.scaling(8) == 2.0
    assert from_flat({"lora.alpha": 16.0, "lora.use-rslora": True}).lora.scaling(16) == 4.0
    assert from_flat({}).lora.scaling(4, alpha=2.0) == 0.5


def test_options_are_the_rules_own_names() -> None:
    config = from_flat({"strategy.options": '{"some-thing": 1}', "strategy.init-a": "orthonormal"})
    assert config.strategy.option_dict == {"init_a": "orthonormal", "some_thing": 1}


def test_all_sections_are_frozen_and_keyword_only() -> None:
    config = RunConfig()
    for part in (config, *(getattr(config, f.name) for f in dataclasses.fields(config))):
        if dataclasses.is_dataclass(part):
            first = dataclasses.fields(part)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, first, getattr(part, first))
            assert all(f.kw_only for f in dataclasses.fields(part))


def test_a_home_directory_is_written_out_in_keys_that_name_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.toml"
    file.write_text('output-dir = "~/out"\n[data]\nname = "~/a.jsonl"\n[model]\nname = "~/model"\n')
    config = read_config(file)
    places = (config.output_dir, config.data.name, config.model.name)
    assert places == tuple(str(tmp_path / name) for name in ("out", "a.jsonl", "model"))
    with pytest.raises(ConfigError, match="~nobody-there/x: there is no such home directory"):
        read_config(file, {"data.name": "~nobody-there/x"})


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('seed = 7\nmodel.name = "caf\u00e9"\n', encoding="utf-8-sig")
    config = read_config(tmp_path / "c.toml")
    assert (config.seed, config.model.name) == (7, "caf\u00e9")


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"seed": np.int64(3)}, {"seed": 3}),
        ({"lora": {"alpha": np.float32(8)}}, {"lora.alpha": 8.0}),
        ({"lora.use-rslora": np.bool_(True)}, {"lora.use-rslora": True}),
        ({"data": {"name": Path("a/b.csv")}}, {"data.name": "a/b.csv"}),
        (
            {"study": {"strategies": ("fedavg", "flora"), "seeds": (1, 2)}},
            {"study.strategies": "fedavg,flora", "study.seeds": "1,2"},
        ),
        ({"study.seeds": np.arange(1, 3)}, {"study.seeds": "1,2"}),
        ({"study.seeds": [np.int64(1)]}, {"study.seeds": "1"}),
        ({"strategy": {"options": {"lam": np.float64(0.5)}}}, {"strategy.options": '{"lam": 0.5}'}),
        (
            {"client-groups": ({"partitions": "0", "rank": np.int64(2)},)},
            {"client-groups": '[{"partitions": "0", "rank": 2}]'},
        ),
    ],
)
def test_values_of_python_and_numpy_are_what_they_stand_for(
    given: dict[str, Any], plain: dict[str, Any]
) -> None:
    found = flatten(given)
    assert found == plain
    assert [type(value) for value in found.values()] == [type(value) for value in plain.values()]
    assert as_config(given) == from_flat(plain)


def test_a_path_may_stand_for_the_name_of_a_section() -> None:
    assert from_keywords({"data": Path("a.csv"), "seed": np.int64(3)}) == {"data.name": "a.csv", "seed": 3}


@pytest.mark.parametrize("value", [(1, 2), None, datetime.date(2026, 1, 1), np.array([1, 2])])
def test_what_no_key_takes_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank = .*: must be a boolean, number or string"):
        flatten({"lora": {"rank": value}})
