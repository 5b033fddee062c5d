"""A client's own account: charged before training, once for each release, never over the budget."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients import budget
from clients.budget import noise_of, plan_release, train_within_budget
from clients.execute import train_instruction
from clients.ledger_ref import (
    LedgerRef,
    check_disjoint,
    check_ledgers,
    fingerprint,
    ledger_directory,
    name_of,
)
from clients.node import Node
from fedlora import wire
from fedlora.config import RunConfig, read_config
from fedlora.core.factors import LoraFactors
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import ServerState, State
from fedlora.errors import BudgetExceeded, ConfigError, LedgerRefused
from fedlora.privacy.calibration import epsilon_spent
from fedlora.privacy.ledger import read_ledgers
from fedlora.privacy.types import PrivacySpent
from fedlora.server.directory import RunDirectory
from tests.clients.samples import examples
from tests.conftest import tiny_config
from tests.in_process import client_runtime

PRIVATE = {"privacy.mode": "example", "privacy.target-epsilon": 3.0, "privacy.accountant": "rdp"}


def train(
    config: RunConfig, directory: Path, server_round: int, seed: int | None = None, **ledger_ref: str
) -> PrivacySpent:
    """One round of partition 0 from the same start."""
    runtime = client_runtime(config)
    adapters = fresh_adapters(runtime.model.modules, 4, 2.0, 0)
    runtime.model.load(adapters, {}, trained=frozenset("AB"), train_head=True)
    plan = plan_release(
        runtime, config, LedgerRef(directory=directory, **{"run_key": "run", **ledger_ref}),
        partition_id=0, server_round=server_round, local_steps=3, seed=seed, start="same",
    )  # fmt: skip
    return train_within_budget(runtime, plan, seed=seed)[1]


def test_noise_is_for_the_most_rounds_that_the_server_allows() -> None:
    few = tiny_config(**PRIVATE, **{"num-server-rounds": 40, "privacy.max-participations": 4})
    many = tiny_config(**PRIVATE, **{"num-server-rounds": 40})
    low, high = noise_of(few, 0.05, 3), noise_of(many, 0.05, 3)
    assert low < high
    assert epsilon_spent(low, 0.05, 12, 1e-5, "rdp") == pytest.approx(3.0, rel=0.01)
    assert epsilon_spent(high, 0.05, 120, 1e-5, "rdp") == pytest.approx(3.0, rel=0.01)


def test_keys_at_their_defaults_leave_a_charged_release_what_it_was() -> None:
    """A key that is missing in `ADDED` charges a run that goes on again for the round that it repeats."""
    run = RunConfig()
    settings = [*budget._settings(run, run.train), budget._as_charged(run.secure)]
    known = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    assert known[:16] == "05a6cfdda9057d4c", "as it was before there were these keys"


@pytest.mark.parametrize("seed", [1, None], ids=["seeded", "system"])
def test_a_client_declines_before_it_would_overspend(seed: int | None, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE)
    spent = [train(config, tmp_path, server_round, seed) for server_round in (1, 2, 3)]
    epsilons = [one.epsilon for one in spent]
    assert epsilons == sorted(epsilons)
    assert 2.9 < epsilons[-1] <= 3.0
    assert [(one.releases, one.steps) for one in spent] == [(1, 3), (2, 6), (3, 9)]
    assert len({one.ledger_head for one in spent}) == 3
    with pytest.raises(BudgetExceeded, match=r"target-epsilon = 3.0: 12 steps would spend .* 9 of them"):
        train(config, tmp_path, 4, seed)
    if seed is None:
        with pytest.raises(BudgetExceeded):
            train(config, tmp_path, 3, seed)
    else:
        assert train(config, tmp_path, 3, seed) == spent[-1]
    standing = read_ledgers(tmp_path)[0].standing
    assert (standing.releases, standing.unfinished, standing.epsilon) == (3, 0, epsilons[-1])
    assert np.isfinite(epsilons).all()


def test_what_is_given_as_noise_is_held_to_the_budget_too(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE, **{"privacy.noise-multiplier": 0.7})
    with pytest.raises(BudgetExceeded, match=r"3 steps would spend"):
        train(config, tmp_path, 1)


def test_runs_add_up_and_other_bits_are_another_release(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE)
    assert train(config, tmp_path, 1, seed=1).releases == 1
    assert train(config, tmp_path, 1, seed=1).releases == 1
    assert train(config, tmp_path, 1, seed=2).releases == 2
    assert train(config, tmp_path, 1, seed=2, run_key="other").releases == 1
    assert read_ledgers(tmp_path)[0].standing.releases == 3
    with pytest.raises(BudgetExceeded):
        train(config, tmp_path, 1, seed=2, run_key="third")


@pytest.mark.parametrize(
    "change",
    [
        {"train.learning-rate": 0.3}, {"privacy.max-grad-norm": 2.0}, {"lora.dropout": 0.1},
        {"privacy.clipping": "per-layer"}, {"privacy.release-metrics": True},
    ],
)  # fmt: skip
def test_a_setting_that_changes_the_bits_is_charged(change: Any, tmp_path: Path, cache: Path) -> None:
    before, after = tiny_config(**PRIVATE), tiny_config(**PRIVATE, **change)
    same = dataclasses.replace(before, round_timeout=7.0)
    assert [train(c, tmp_path, 1, seed=1).releases for c in (before, same, after)] == [1, 1, 2]


def test_the_release_is_on_the_ledger_before_training_begins(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any, **settings: Any) -> None:
        assert read_ledgers(tmp_path)[0].standing.releases == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(budget, "train_private", die)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(**PRIVATE), tmp_path, 1)
    standing = read_ledgers(tmp_path)[0].standing
    assert (standing.releases, standing.unfinished) == (1, 1)


def test_a_ledger_without_the_head_that_the_server_knows_is_refused(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE)
    data = client_runtime(config).data
    head = train(config, tmp_path, 1).ledger_head
    check_ledgers(config, data, [0, 1], tmp_path, {0: head}, config.privacy.unit_column)
    train(config, tmp_path, 2, known_head=head)
    with pytest.raises(LedgerRefused, match="was set back"):
        train(config, tmp_path, 3, known_head="0" * 64)
    for heads in ({0: "0" * 64}, {1: head}):
        with pytest.raises(LedgerRefused, match="was set back"):
            check_ledgers(config, data, [0, 1], tmp_path, heads, config.privacy.unit_column)
    assert read_ledgers(tmp_path)[0].standing.releases == 2


def test_an_order_is_the_same_release_only_from_the_same_start(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE)
    model = client_runtime(config).model
    head = model.template(4, 2.0, share_head=True).head

    def ordered(seed: int = 0, **settings: Any) -> wire.Reply:
        given = {
            "scaling": 2.0, "rank": 4, "trained": "A,B", "uploaded": "A,B",
            "modules": json.dumps(sorted(model.modules)), "run-key": "run", **settings,
        }  # fmt: skip
        arrays = wire.to_peft(fresh_adapters(model.modules, 4, 2.0, seed), head)
        order = wire.TrainInstruction(
            server_round=1, arrays=arrays, parts={}, needs=wire.Needs(), config=given
        )
        node = Node(partition_id=0, state_dir=tmp_path, simulation=True)
        return train_instruction(client_runtime(config), order, config, node)

    replies = [ordered(), ordered(), ordered(1), ordered(trained="B")]
    assert [reply.privacy and reply.privacy["releases"] for reply in replies] == [1, 1, 2, 3]
    for declined, why in (
        (ordered(2), "target-epsilon = 3.0"),
        (ordered(**{"ledger-head": "0"}), "was set back"),
    ):
        assert declined.status == wire.DECLINED
        assert why in declined.reason


def test_a_checkpoint_remembers_the_heads(tmp_path: Path) -> None:
    factors = LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    state = State(round=1, adapters={"layer": factors}, head={})
    RunDirectory(tmp_path).save_checkpoint(ServerState(state, ledger_heads={3: "abc"}))
    loaded = RunDirectory(tmp_path, resume=True).load_checkpoint()
    assert loaded is not None
    assert loaded.ledger_heads == {3: "abc"}


# --- whose examples ------------------------------------------------------------------------------------


def test_a_partition_is_named_by_what_decides_its_examples() -> None:
    def name(**changes: Any) -> tuple[str, str, str]:
        return name_of(tiny_config(**{"data.partitioner": "iid", "data.num-partitions": 4, **changes}), 2)

    first = name()
    assert first[0] == "synthetic"
    assert first[2] == "partition-2"
    for same in ({"lora.rank": 8}, {"data.max-length": 32}, {"data.evaluate-examples": 9}, PRIVATE):
        assert name(**same) == first
    for other in ({"seed": 7}, {"data.num-partitions": 5}, {"data.test-fraction": 0.3}):
        assert name(**other)[0] == first[0]
        assert name(**other)[1] != first[1]
    assert name(**{"privacy.dataset-id": "mine"}) == ("mine", *first[1:])
    natural = [name_of(tiny_config(seed=seed), 0) for seed in (1, 2)]
    assert natural[0] == natural[1], "no draw decides who holds what"


def test_a_file_has_one_name_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    monkeypatch.chdir(tmp_path)
    spellings = ("a.csv", "b.csv", str(tmp_path / "a.csv"))
    assert len({name_of(tiny_config(**{"data.name": name}), 0) for name in spellings}) == 1


def test_a_fingerprint_is_of_the_clients_own_texts_and_labels() -> None:
    data, own = examples(), np.array([2, 3, 11])
    known = fingerprint(data, own)
    assert fingerprint(examples(), own) == known
    assert fingerprint(data, np.array([2, 3, 12])) != known
    for name in ("tokens", "labels"):
        for where, differs in ((3, True), (5, False)):
            place = int(data.offsets[where]) if name == "tokens" else where
            values = getattr(data, name).copy()
            values[place] = 1 - values[place]
            assert (fingerprint(dataclasses.replace(data, **{name: values}), own) != known) is differs


def test_partitions_that_share_examples_are_refused(cache: Path) -> None:
    config = tiny_config(**PRIVATE)
    data = client_runtime(config).data
    check_disjoint(config, data, range(data.num_partitions))
    shared = data.flat.copy()
    shared[data.offsets[2]] = shared[0]
    doubled = dataclasses.replace(data, flat=shared)
    check_disjoint(config, doubled, [0, 1, 3])
    with pytest.raises(ConfigError, match=r"partitions 0 and 2 share 1 examples"):
        check_disjoint(config, doubled, range(data.num_partitions))


def test_a_run_does_not_say_where_a_nodes_ledger_is(tmp_path: Path) -> None:
    config = tiny_config(**{"privacy.ledger": "elsewhere"})
    assert ledger_directory(tiny_config(), tmp_path, simulation=False) == tmp_path / "ledger"
    assert ledger_directory(config, tmp_path, simulation=True) == Path("elsewhere").absolute()
    with pytest.raises(LedgerRefused, match=r"privacy\.ledger = 'elsewhere'"):
        ledger_directory(config, tmp_path, simulation=False)


def test_a_configured_ledger_is_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").write_text('[privacy]\nledger = "mine"\n')
    monkeypatch.chdir(tmp_path)
    assert read_config(Path("run.toml")).privacy.ledger == str(tmp_path / "mine")
    assert read_config(Path("run.toml"), {"privacy.ledger": ""}).privacy.ledger == ""
