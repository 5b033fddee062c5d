"""Before round 1 a node and the server compare what they have installed, base weights and label names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from transformers import LlamaConfig, LlamaForSequenceClassification

from clients import owner
from clients.handler import BASE_SEEN, TRAIN, handle
from fedlora import client_app, wire
from fedlora.assets.loading import DRAWN
from fedlora.config import RunConfig, to_flat
from fedlora.core.code import compared, versions
from fedlora.errors import shown
from fedlora.models import AdaptedModel
from fedlora.simulation.local_grid import speak_as_server
from strategies.nodes import NodeDirectory
from tests.conftest import tiny_config
from tests.deployment.test_limits import PRIVATE, order
from tests.federation.fake_grid import FakeGrid
from tests.in_process import RUNTIMES, client_runtime


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "REFUSAL_SECONDS", 0.01)


def answered(config: RunConfig, home: Path, base: str = "", labels: Any = ()) -> wire.Reply:
    content = order(config, 1, labels)
    if base:
        content.config_records[wire.CONFIG]["base-digest"] = base
    node = {"partition-id": 0, "state-dir": str(home)}
    return wire.decode_reply(handle(TRAIN, content, to_flat(config), node, RUNTIMES))


def test_other_weights_are_declined_before_training_and_nothing_is_kept(tmp_path: Path, cache: Path) -> None:
    config = tiny_config()
    reply = answered(config, tmp_path, "0" * 64)
    assert reply.status == wire.DECLINED
    assert reply.reason.startswith("model.name = 'tiny': its weights on this node are not the server's")
    assert "\n" not in reply.reason
    assert not list(tmp_path.rglob(BASE_SEEN))


def test_the_same_weights_are_hashed_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    model = client_runtime(config).model
    own, asked = model.base_digest(), list[int]()
    monkeypatch.setattr(type(model), "base_digest", lambda self: (asked.append(1), own)[1])  # type: ignore[func-returns-value]
    for _ in range(2):
        assert answered(config, tmp_path, own).status == wire.OK
    assert asked == [1]
    (seen,) = tmp_path.rglob(BASE_SEEN)
    seen.write_bytes(b"\xff" * 64)  # damaged: no text, and hashed again
    assert answered(config, tmp_path, own).status == wire.OK
    assert (asked, seen.read_text()) == ([1, 1], own)


def test_one_changed_weight_is_another_base(cache: Path) -> None:
    model = client_runtime(tiny_config()).model
    before = model.base_digest()
    name, weight = next(iter(model.base.pristine_weights.items()))
    kept = weight.clone()
    try:
        weight.view(-1)[0] += 1e-3
        assert model.base_digest() != before, name
    finally:
        weight.copy_(kept)
    assert model.base_digest() == before


def test_what_is_computed_where_a_model_is_loaded_is_no_other_base() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    module = LlamaForSequenceClassification(LlamaConfig(vocab_size=8, pad_token_id=0, **sizes))
    setattr(module, DRAWN, ("model.norm.weight",))
    model = AdaptedModel(module, ("model.layers.0.self_attn.q_proj",))
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    before = model.base_digest()
    for name in ("model.rotary_emb.inv_freq", "model.norm.weight"):  # another processor's last bits
        tensors[name].data.mul_(1 + 2**-20)
    assert model.base_digest() == before
    tensors["model.layers.0.mlp.up_proj.weight"].data.mul_(1 + 2**-20)
    assert model.base_digest() != before


LABELS = ("calm", "cross", "curious", "proud")


@pytest.mark.parametrize("labels", [LABELS[::-1], LABELS[:3], (*LABELS, "of two\nlines")])
def test_other_labels_or_another_order_are_declined(
    labels: tuple[str, ...], tmp_path: Path, cache: Path
) -> None:
    reply = answered(tiny_config(), tmp_path, labels=labels)
    assert reply.status == wire.DECLINED
    assert f"its labels are {shown(LABELS)} on this node, the run's are {shown(labels)}" in reply.reason
    assert "\n" not in reply.reason


def test_a_node_needs_no_evaluation_sets(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**{"data.evaluation-sets": '{"more": "/srv/of-the-server.jsonl"}'})
    node = {"partition-id": 0, "state-dir": str(tmp_path)}
    reply = handle(TRAIN, order(tiny_config(), 1, ()), to_flat(config), node, RUNTIMES)
    assert wire.decode_reply(reply).status == wire.OK


def test_a_protected_node_gives_its_one_refusal(tmp_path: Path, cache: Path) -> None:
    reply = answered(tiny_config(**PRIVATE), tmp_path, "0" * 64)
    assert (reply.status, reply.reason) == (wire.DECLINED, owner.REFUSAL)


@pytest.mark.parametrize(
    ("theirs", "cannot", "can"),
    [
        ("fedlora 1.0.1", True, False),
        ("torch 2.9.0", False, True),
        ("torch 3.0.0", True, False),
        ("peft 0.18.0", True, False),
        ("peft 0.19.9", False, True),
        ("unknown 1", False, False),
        ("nonsense", False, False),
        ("torch 9\nERROR", False, False),
        ("torch 9" + "9" * 99, False, False),
    ],
)
def test_what_can_work_together(theirs: str, cannot: bool, can: bool) -> None:
    found = compared([theirs], ["fedlora 1.0.0", "torch 2.8.0", "peft 0.19.1"])
    assert (bool(found[0]), bool(found[1])) == (cannot, can)


def test_a_node_says_what_it_has_installed() -> None:
    speak_as_server(run_id=1)
    question = Message(RecordDict(), 1, "query")
    context = Context(0, 1, {"partition-id": 2}, RecordDict(), {})
    identify: ClientAppCallable = client_app.identify
    told = identify(question, context).content.config_records["config"]
    assert told["partition-id"] == 2
    assert told["versions"] == versions()
    assert any(entry.startswith("torch ") for entry in versions())


def grid_of(told: dict[int, list[str]]) -> FakeGrid:
    def client(message: Message, partition: int) -> Message:
        node = message.metadata.dst_node_id
        if not told[node]:
            return Message(Error(code=0, reason="busy"), reply_to=message)
        answer = ConfigRecord({"partition-id": node, "versions": told[node]})
        return Message(RecordDict({"config": answer}), reply_to=message)

    grid = FakeGrid([], client, tells_partitions=False)
    grid.nodes = dict.fromkeys(told, 0)
    return grid


@pytest.mark.parametrize("closed", [False, True])
def test_a_node_of_other_libraries_takes_no_part_until_it_has_the_same(
    closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("strategies.nodes.log", lambda level, text, *more: warned.append(text % more))
    nodes = NodeDirectory(closed=closed)
    told = {1: versions(), 2: ["fedlora 0.0.0", *versions()[1:]], 3: ["torch 2.0.1"]}
    for _ in range(2):
        assert nodes.refresh(grid_of(told), 1, timeout=0.0) == {1: 1, 3: 3}
        assert list(nodes.refused) == [2]
        assert nodes.refused[2].startswith("its node has fedlora 0.0.0, here ")
    assert sum("partition 2 takes no part" in line for line in warned) == 1
    assert sum("partition 3 takes part: its node has torch 2.0.1" in line for line in warned) == 1
    assert nodes.refresh(grid_of({**told, 2: []}), 1, timeout=0.0) == {1: 1, 3: 3}  # it does not answer
    assert list(nodes.refused) == [2]
    assert nodes.refresh(grid_of({**told, 2: versions()}), 1, timeout=0.0) == {1: 1, 2: 2, 3: 3}
    assert nodes.refused == {}
