"""What a study expands to, and what it refuses."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fedlora.config import FlatConfig, RunConfig, StudyConfig, from_flat, to_flat
from fedlora.errors import ConfigError
from fedlora.study.plan.cells import Cell, expand


def study(num_partitions: int = 4, **keys: Any) -> list[Cell]:
    flat: FlatConfig = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return expand(from_flat(flat), num_partitions)


def changed(cell: Cell, **base: Any) -> FlatConfig:
    """The keys in which a cell departs from the file."""
    before = to_flat(from_flat({k.replace("__", ".").replace("_", "-"): v for k, v in base.items()}))
    return {k: v for k, v in to_flat(cell.config).items() if before[k] != v and not k.startswith("study.")}


def examples_a_round(config: RunConfig, clients: int) -> int:
    return clients * config.train.local_steps * config.train.batch_size


def test_each_strategy_has_its_overrides_and_nothing_else() -> None:
    overrides = json.dumps({"flora": {"train.learning-rate": 0.005, "train": {"local-steps": 7}}})
    fedavg, flora = study(study__strategies="fedavg, flora", study__overrides=overrides)
    assert changed(fedavg) == {}
    assert changed(flora) == {"strategy.name": "flora", "train.learning-rate": 0.005, "train.local-steps": 7}
    assert [fedavg.label, flora.label, flora.group, flora.kind] == ["fedavg", "flora", "flora", "strategy"]


def test_own_methods_and_one_strategy_with_several_settings_are_strategies() -> None:
    cells = study(
        study__strategies="flora, mixed = flora, strategies.rules.flora:FLoRARule",
        study__overrides='{"mixed": {"lora.ranks": "2,4,8,16"}, "FLoRARule": {"train.learning-rate": 0.5}}',
    )
    assert [(cell.label, cell.kind) for cell in cells] == [
        (n, "strategy") for n in ("flora", "mixed", "FLoRARule")
    ]
    assert changed(cells[1]) == {"strategy.name": "flora", "lora.ranks": "2,4,8,16"}
    assert changed(cells[2]) == {
        "strategy.name": "strategies.rules.flora:FLoRARule",
        "train.learning-rate": 0.5,
    }


def test_cells_carry_no_study_so_that_its_title_can_change_later() -> None:
    (cell,) = study(study__strategies="flora", study__title="a title")
    assert cell.config.study == StudyConfig()


def test_seeds_are_paired_and_one_seed_is_complete_before_the_next() -> None:
    cells = study(study__strategies="fedavg,flora", study__seeds="3-4")
    assert [c.label for c in cells] == ["fedavg-seed-3", "flora-seed-3", "fedavg-seed-4", "flora-seed-4"]
    assert [c.config.seed for c in cells] == [c.seed for c in cells] == [3, 3, 4, 4]
    assert [c.group for c in cells] == ["fedavg", "flora"] * 2


def test_without_seeds_the_files_own_seed_is_used() -> None:
    (cell,) = study(seed=11, study__strategies="flora")
    assert (cell.label, cell.seed, cell.config.seed) == ("flora", 11, 11)


def test_variants_lie_on_top_of_the_file_without_the_overrides() -> None:
    cells = study(
        lora__rank=4,
        study__strategies="flora",
        study__overrides='{"flora": {"train.learning-rate": 0.5}}',
        study__variants='{"flora-private": {"strategy.name": "flora", "privacy.mode": "example"}}',
    )
    assert (cells[1].kind, cells[1].group) == ("variant", "flora-private")
    assert changed(cells[1], lora__rank=4) == {"strategy.name": "flora", "privacy.mode": "example"}


def test_everything_is_run_under_each_setting_and_the_whole_name_decides_last() -> None:
    cells = study(
        lora__rank=4,
        study__strategies="flora",
        study__settings='{"a": {"lora.rank": 2, "train.batch-size": 3}, "b": {}}',
        study__overrides='{"flora": {"train.batch-size": 5}, "flora-b": {"train.batch-size": 6}, '
        '"own-a": {"lora.alpha": 9.0}}',
        study__variants='{"own": {"lora.rank": 8}}',
    )
    assert [(c.label, c.method, c.setting) for c in cells] == [
        ("flora-a", "flora", "a"), ("own-a", "own", "a"), ("flora-b", "flora", "b"), ("own-b", "own", "b"),
    ]  # fmt: skip
    found = [(c.config.lora.rank, c.config.train.batch_size, c.config.lora.alpha) for c in cells]
    alpha, batch_size = RunConfig().lora.alpha, RunConfig().train.batch_size
    assert found == [(2, 5, alpha), (8, 3, 9.0), (4, 6, alpha), (8, batch_size, alpha)]


# --- references --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "minimum", "sampled"), [(1.0, 1, 10), (0.3, 1, 3), (0.01, 2, 2), (0.55, 1, 5)]
)
def test_centralised_has_the_studys_steps_and_examples(fraction: float, minimum: int, sampled: int) -> None:
    base = {"fraction_train": fraction, "min_train_nodes": minimum, "min_available_nodes": 10}
    (cell,) = study(10, **base, study__references="centralised")
    config = cell.config
    assert config.train.local_steps == RunConfig().train.local_steps
    assert examples_a_round(config, 1) == examples_a_round(RunConfig(), sampled)
    assert (config.data.partitioner, config.data.num_partitions) == ("iid", 1)
    assert (config.fraction_train, config.min_train_nodes, config.min_available_nodes) == (1.0, 1, 1)


def test_centralised_averages_unequal_local_steps_and_takes_the_largest_rank() -> None:
    groups = '[{"partitions": "0", "local-steps": 30, "rank": 16}]'
    (cell,) = study(2, train__local_steps=10, client_groups=groups, study__references="centralised")
    assert examples_a_round(cell.config, 1) == 8 * (30 + 10)
    assert cell.config.lora.rank == 16
    assert cell.config.client_groups == ""


def test_references_start_from_fedavgs_overrides() -> None:
    overrides = '{"fedavg": {"train.learning-rate": 0.5}}'
    cells = study(
        2, study__strategies="fedavg", study__overrides=overrides, study__references="centralised,local-only"
    )
    assert [c.config.train.learning_rate for c in cells] == [0.5] * 3


def test_references_drop_the_options_of_the_files_own_rule() -> None:
    options = {"strategy__name": "lora-fair", "strategy__options": '{"lam": 0.1}'}
    (cell,) = study(2, **options, study__references="centralised")
    assert (cell.config.strategy.name, cell.config.strategy.options) == ("fedavg", "")


def test_local_only_is_one_run_in_which_everybody_trains_in_every_round() -> None:
    (cell,) = study(3, study__references="local-only", fraction_train=0.5, lora__ranks="4,8,16")
    assert cell.label == cell.group == "local-only"
    assert changed(cell, fraction_train=0.5, lora__ranks="4,8,16") == {
        "strategy.name": "local-only",
        "model.head": "local",
        "fraction-train": 1.0,
        "evaluate-every": 10,
    }


def test_references_have_no_second_adapters() -> None:
    """Who is alone has no global adapter for one to stand beside; the strategies of the file keep theirs."""
    cells = study(
        2, study__strategies="flora", study__references="centralised,local-only", lora__personal_rank=3
    )
    assert {c.group: c.config.lora.personal_rank for c in cells} == {
        "flora": 3, "centralised": 0, "local-only": 0,
    }  # fmt: skip


# --- refusals ----------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "study.strategies = ''"),
    ({"study__strategies": "flroa"}, "strategy.name = 'flroa' (did you mean flora?)"),
    ({"study__strategies": "flora,flora"}, "study.strategies: 'flora' is there more than once"),
    ({"study__strategies": "flora", "study__seeds": "1,1"}, "study.seeds: '1' is there more than once"),
    ({"study__strategies": "flora", "study__overrides": '{"ffa": {}}'}, "study.overrides ffa: not one of"),
    (
        {"study__strategies": "flora", "study__overrides": '{"flora": {"train.lr": 1}}'},
        "study.overrides flora: train.lr = 1: unknown key",
    ),
    (
        {"study__strategies": "flora", "study__overrides": '{"flora": {"lora.rank": 0}}'},
        "study.overrides flora: lora.rank = 0: must be > 0",
    ),
    (
        {
            "study__strategies": "flora",
            "study__overrides": '{"flora": {"strategy.options": "{\\"lam\\": 1}"}}',
        },
        "study.overrides flora: strategy.options lam = 1",
    ),
    (
        {"study__strategies": "flora", "study__overrides": '{"flora": 3}'},
        "study.overrides flora = 3: must be",
    ),
    ({"study__strategies": "flora", "study__overrides": '{"flora": {"seed": 3}}'}, "seed cannot be set here"),
    (
        {"study__strategies": "flora", "study__overrides": '{"flora": {"strategy.name": "ffa"}}'},
        "strategy.name cannot be set here",
    ),
    ({"study__variants": '{"a": {"study.seeds": "1"}}'}, "study.seeds cannot be set here"),
    ({"study__variants": '{"a": {"lora.rank": [1]}}'}, "study.variants a: lora.rank = [1]: must be"),
    ({"study__variants": '{"a": {"nothing": 1}}'}, "study.variants a: nothing = 1: unknown key"),
    ({"study__variants": '{"../a": {}}'}, "'../a' names a directory"),
    ({"study__strategies": "flora", "study__variants": '{"FLoRA": {}}'}, "'FLoRA' is there more than once"),
    (
        {"study__strategies": "flora", "study__overrides": '{"flora-a": {}}'},
        "study.overrides flora-a: not one of",
    ),
    (
        {"study__strategies": "flora", "study__settings": '{"a": {"lora.rank": 0}}'},
        "study.settings a: lora.rank = 0: must be > 0",
    ),
    (
        {
            "study__strategies": "flora",
            "study__settings": '{"a": {}}',
            "study__overrides": '{"flora-a": {"lora.rank": 0}}',
        },
        "study.overrides flora-a: lora.rank = 0: must be > 0",
    ),
    ({"study__strategies": "flora", "study__settings": '{"../a": {}}'}, "names a directory"),
    (
        {"study__references": "centralised", "study__settings": '{"a": {"data.num-partitions": 2}}'},
        "study.settings a: changes the data",
    ),
    ({"study__references": "centralised", "partitions": "0-1"}, "partitions = '0-1' leaves some out"),
    (
        {"study__references": "centralised", "train__local_epochs": 1, "fraction_train": 0.5},
        "train.local-epochs = 1 and 2 of 4 clients",
    ),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        study(**keys)
    assert "\n" not in str(caught.value)
