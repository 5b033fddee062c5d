"""What the owner of a node decides holds, whatever a run asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from clients import owner
from clients.handler import EVALUATE, TRAIN, handle
from clients.node_settings import node_settings, read_node
from fedlora import wire
from fedlora.config import RunConfig, to_flat
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import Broadcast
from fedlora.errors import ConfigError
from fedlora.privacy.ledger import read_ledgers
from tests.conftest import tiny_config
from tests.in_process import RUNTIMES, client_runtime

PRIVATE: dict[str, Any] = {
    "privacy.mode": "example",
    "privacy.target-epsilon": 8.0,
    "privacy.accountant": "rdp",
    "num-server-rounds": 4,
    "train.local-steps": 2,
}


LABELS = ("neg", "pos")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "REFUSAL_SECONDS", 0.01)


def order(config: RunConfig, server_round: int, labels: Sequence[str] = ()) -> RecordDict:
    runtime = client_runtime(config)
    adapters, labels = fresh_adapters(runtime.model.modules, 4, 2.0, 0), labels or runtime.data.label_names
    both = frozenset("AB")
    broadcast = Broadcast(
        adapters=adapters, trained=both, uploaded=both, modules=frozenset(adapters), head={}
    )
    about = wire.instruction_config(broadcast, wire.Needs(), "kaiming")
    settings = {"server-round": server_round, "run-key": "run", "labels": list(labels), **about}
    return RecordDict(
        {
            wire.ARRAYS: wire.to_record(wire.moving_tensors(broadcast)),
            wire.CONFIG: ConfigRecord({k: v for k, v in settings.items() if v != []}),
        }
    )


def reply(
    config: RunConfig,
    tmp_path: Path,
    server_round: int = 1,
    labels: Sequence[str] = (),
    **node: Any,
) -> wire.Reply:
    labels = labels or (LABELS if node.get("data") else ())
    node_config = {"partition-id": 0, "state-dir": str(tmp_path / "state"), **node}
    content = handle(TRAIN, order(config, server_round, labels), to_flat(config), node_config, RUNTIMES)
    return wire.decode_reply(content)


@pytest.mark.parametrize("mode", ["none", "client"])
def test_a_run_without_a_guarantee_for_examples_is_declined(
    mode: str, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(**{"privacy.mode": mode})
    refused = reply(config, tmp_path, **{"max-epsilon": 3.0})
    assert refused.status == wire.DECLINED
    assert f"privacy.mode = {mode!r}: the owner of this node allows epsilon 3" in caplog.text
    assert reply(config, tmp_path).status == wire.OK


def test_a_looser_delta_than_the_owner_allows_is_declined(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**{**PRIVATE, "privacy.target-delta": 1e-3})
    assert reply(config, tmp_path, **{"max-epsilon": 8.0}).status == wire.DECLINED
    assert reply(config, tmp_path, **{"max-epsilon": 8.0, "max-delta": 1e-3}).status == wire.OK


def test_the_owners_limit_ends_what_the_runs_target_would_allow(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE)
    free = [reply(config, tmp_path / "free", r).status for r in range(1, 5)]
    bound = [reply(config, tmp_path / "bound", r, **{"max-epsilon": 6.0}) for r in range(1, 5)]
    assert free == [wire.OK] * 4
    statuses = [r.status for r in bound]
    assert wire.OK in statuses
    assert statuses[-1] == wire.DECLINED
    assert max(r.privacy["epsilon"] for r in bound if r.privacy) <= 6.0


def test_spending_is_written_down_under_the_owners_name(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": f"word {i}", "label": ("neg", "pos")[i % 2]} for i in range(24)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(**{**PRIVATE, "privacy.dataset-id": "what the server calls it"})
    node = {"data": str(tmp_path / "own.jsonl"), "dataset-id": "ward 7"}
    assert reply(config, tmp_path, **node).status == wire.OK
    accounts = read_ledgers(tmp_path / "state" / "ledger")
    assert [account.identity for account in accounts] == ["ward 7"]


def test_a_refusal_of_own_data_tells_others_neither_path_nor_content(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "x", "label": "leukaemia"}\n')
    node = {"data": str(tmp_path / "secret.jsonl"), "dataset-id": "ward 7"}
    refused = reply(tiny_config(), tmp_path, **node)
    assert refused.status == wire.DECLINED
    assert "labels that the run does not know" in refused.reason
    assert not [word for word in ("leukaemia", "secret", "ward") if word in refused.reason]


@pytest.mark.parametrize(
    ("node_config", "named"),
    [
        ({}, "partition-id is missing"),
        ({"partition-id": -1}, "partition-id = -1"),
        ({"partition-id": 0, "max-epsilons": 1.0}, "max-epsilons = 1.0: unknown key"),
        (
            {"partition-id": 0, "data": "own.jsonl", "dataset-id": "x"},
            "data = 'own.jsonl': must be an absolute",
        ),
        ({"partition-id": 0, "data": "/own.jsonl"}, "dataset-id = ''"),
        ({"partition-id": 0, "max-epsilon": -1.0}, "max-epsilon = -1.0"),
        ({"partition-id": 0, "max-delta": 1.0}, "max-delta = 1.0"),
        ({"partition-id": 0, "keep-model": "yes"}, "keep-model = 'yes'"),
    ],
)
def test_settings_that_are_wrong_are_named(node_config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        node_settings(node_config)
    assert named in str(caught.value)


def test_a_node_directory_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"node\.toml: there is no such file"):
        read_node(tmp_path)


# --- what a run may name on a node --------------------------------------------------------------------

MARKED = "open({mark!r}, 'w')\nclass Mine: pass\n"
NAMED = [
    ({"model.name": "/srv/other/model"}, "model.name = '/srv/other/model'"),
    ({"model.name": "../model"}, "model.name = '../model'"),
    ({"model.name": "here"}, "model.name = 'here'"),
    ({"data.name": "/etc/passwd"}, "data.name = '/etc/passwd'"),
    ({"data.test": "~/mail.jsonl"}, "data.test = '~/mail.jsonl'"),
    ({"privacy.ledger": "elsewhere"}, "privacy.ledger = 'elsewhere'"),
    ({"train.optimizer": "mine:Mine"}, "train.optimizer = 'mine:Mine'"),
    ({"lora.method": "mine:TUNER"}, "lora.method = 'mine:TUNER'"),
]


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize(("keys", "named"), NAMED)
def test_what_the_owner_does_not_allow_a_run_cannot_name(
    keys: dict[str, Any], named: str, protected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """One line in the node's own log, the one refusal outward, nothing read or imported."""
    (tmp_path / "mine.py").write_text(MARKED.format(mark=str(tmp_path / "imported")))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sent = order(tiny_config(), 1)
    run = {**to_flat(tiny_config(**(PRIVATE if protected else {}))), **keys}
    node = {"partition-id": 0, "state-dir": str(tmp_path / "state")}
    with caplog.at_level("WARNING", "fedlora"):
        answered = wire.decode_reply(handle(TRAIN, sent, run, node, RUNTIMES))
    assert (answered.status, answered.reason) == (wire.DECLINED, owner.REFUSAL)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fedlora"]
    assert line == f"declined: {named}: allow in node.toml does not name it"
    assert not (tmp_path / "imported").exists()


def test_what_the_owner_allows_may_be_named_letter_for_letter(tmp_path: Path) -> None:
    settings = node_settings({"partition-id": 0, "allow": "/srv/model, mine:Mine"})
    for keys in ({"model.name": "/srv/model"}, {"train.optimizer": "mine:Mine"}, {"model.name": "org/model"}):
        owner.refuse_beyond_allowed(tiny_config(**keys), settings)
    for keys in (
        {"model.name": "/srv/model/"},
        {"model.name": "/srv/model/../x"},
        {"train.optimizer": "mine:Other"},
    ):
        with pytest.raises(ConfigError, match=r"allow in node\.toml does not name it"):
            owner.refuse_beyond_allowed(tiny_config(**keys), settings)


def test_with_data_of_its_own_a_node_takes_the_names_of_the_servers_files() -> None:
    """They are the server's test set; the node does not read them."""
    own = node_settings({"partition-id": 0, "data": "/srv/notes.jsonl", "dataset-id": "notes"})
    owner.refuse_beyond_allowed(
        tiny_config(**{"data.name": "/opt/test.csv", "data.test": "/opt/test.csv"}), own
    )


def test_a_strategy_of_the_servers_own_is_not_imported_at_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(MARKED.format(mark=str(tmp_path / "imported")))
    monkeypatch.syspath_prepend(tmp_path)
    run = {**to_flat(tiny_config()), "strategy.name": "theirs:Mine", "output-dir": str(tmp_path / "out")}
    node = {"partition-id": 0, "state-dir": str(tmp_path / "state")}
    answered = wire.decode_reply(handle(TRAIN, order(tiny_config(), 1), run, node, RUNTIMES))
    assert answered.status == wire.OK
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("node", "mode", "told"),
    [
        ({}, "none", False),
        ({}, "example", False),
        ({"release-metrics": True}, "example", True),
        ({"release-metrics": True}, "none", True),
        ({"release-metrics": True, "evaluation-epsilon": 1.0}, "none", False),
    ],
)
def test_what_second_adapters_reach_is_the_owners_to_tell_whatever_the_run_says_of_itself(
    node: dict[str, Any], mode: str, told: bool, tmp_path: Path, cache: Path
) -> None:
    """They are trained without noise: a server that asks under another mode than it trained by gets none."""
    rows = [{"text": f"word {i} of ward", "label": LABELS[i % 2]} for i in range(30)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "partition-id": 0, "state-dir": str(tmp_path / "state"), "data": str(tmp_path / "own.jsonl"),
        "dataset-id": "ward 7", "test-fraction": 0.4, "max-epsilon": 12.0, "max-evaluations": 3, **node,
    }  # fmt: skip
    trained = tiny_config(**PRIVATE, **{"train.batch-size": 4, "lora.personal-rank": 2})
    asked = tiny_config(
        **{**PRIVATE, "privacy.mode": mode}, **{"train.batch-size": 4, "lora.personal-rank": 2}
    )
    if mode == "example":
        asked = tiny_config(
            **PRIVATE, **{"train.batch-size": 4, "lora.personal-rank": 2, "privacy.release-metrics": True}
        )
    done = wire.decode_reply(handle(TRAIN, order(trained, 1, LABELS), to_flat(trained), own, RUNTIMES))
    assert done.status == wire.OK
    content = handle(EVALUATE, order(asked, 1, LABELS), to_flat(asked), own, RUNTIMES)
    reply = wire.decode_reply(content, trained=False)
    assert (reply.status == wire.OK, "accuracy" in reply.metrics) == (told, told)
    if not told:
        assert reply.reason == owner.REFUSAL
        (account,) = read_ledgers(tmp_path / "state" / "ledger")
        assert account.standing.on_evaluations == 0
