"""``upload``: fewer bytes up under every rule, and the server goes on from what clients wrote down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

import strategies
from clients import base_mod, upload_mod
from clients.execute import train_instruction
from clients.node import Node
from fedlora import wire
from fedlora.config import RunConfig, from_flat
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.server.federated_run import FederatedRun
from fedlora.server.validate import UNEQUAL_STEPS, check, configured_screening
from strategies.flower import FactorStrategy
from strategies.replies import validate_reply
from strategies.report import RoundReport
from strategies.request import PendingRequest
from strategies.rules.fedavg import FedAvgRule
from strategies.screening import Screening
from tests.conftest import tiny_config
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import ANY_CHANGE, RULES_AND_CODECS, bits, initial_arrays, watched
from tests.federation.test_anybodys_app import ALPHA, RANK, federate, peft_model, plain_app
from tests.in_process import client_runtime, federated

pytestmark = pytest.mark.slow

CLIENTS = 3
every_codec = pytest.mark.parametrize("upload", ANY_CHANGE)


class Packed(ToyClient):
    """Answers in one array, as clients in a deployment do."""

    def __call__(self, message: Message, partition: int) -> Message | None:
        order = wire.decode_instruction(message.content)
        reply = super().__call__(message, partition)
        assert reply is not None
        (arrays,) = reply.content.array_records.values()
        tensors = wire.from_record(arrays, coded=True)
        reply.content[wire.ARRAYS] = wire.to_record(tensors, None, packed=order.packed)
        return reply


class Remembers(FactorStrategy):
    """Keeps the requests of the last round of training, which the round of evaluation replaces."""

    answered: tuple[PendingRequest, ...] = ()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        result = super().aggregate_train(server_round, replies)
        self.answered = tuple(self.transport.requests)
        return result


def run(
    name: str, path: Path, *, packed: bool = False, rounds: int = 2, **options: str
) -> tuple[Remembers, list[RoundReport]]:
    rule = strategies.make_rule(name)
    strategy = Remembers(rule, scaling=2.0, seed=3, fraction_evaluate=0.0, packed=packed, **options)
    reports = watched(strategy)
    strategy.start(FakeGrid(range(CLIENTS), Packed(path)), initial_arrays(), num_rounds=rounds)
    assert [report.refused for report in reports] == [{}] * rounds
    return strategy, reports


class Owing(FedAvgRule):
    """FedAvg whose clients owe something, where the run names no codec."""

    facts = replace(FedAvgRule.facts, name="owing")

    @property
    def upload(self) -> str:
        return "topk"


def test_a_rules_own_codec_is_checked_as_one_that_the_run_names() -> None:
    keys = {"strategy.name": f"{__name__}:Owing"}
    for given in ({"strategy.robust": "median"}, {"strategy.allocation": "sized-ranks"}):
        with pytest.raises(NotApplicable, match=r"^upload = 'topk': "):
            check(from_flat(keys | given))
        check(from_flat(keys | given | {"upload": "int8"}))
    bounds = [
        configured_screening(config, check(config), simulation=False)
        for config in (from_flat(keys), from_flat(keys | {"upload": "int8"}))
    ]
    assert bounds == [Screening(max_relative_norm=2.0 * UNEQUAL_STEPS), Screening()]


@pytest.mark.parametrize(("name", "upload"), RULES_AND_CODECS)
def test_under_every_rule_what_counts_is_what_was_written_down(
    name: str, upload: str, tmp_path: Path
) -> None:
    """One round: each accepted tensor is off by what the codec declares, and the bytes are the codec's."""
    codec = wire.CODECS[upload]
    if codec.feedback and not strategies.make_rule(name).coordinates_stay:
        with pytest.raises(NotApplicable, match=rf"^upload = '{upload}': .* which {name} would read"):
            run(name, tmp_path, upload=upload)
        return
    exact, whole = run(name, tmp_path / "exact", rounds=1)
    coded, reports = run(name, tmp_path / "coded", upload=upload, rounds=1)
    assert len(coded.answered) == CLIENTS
    for sent, true in zip(accepted(coded), accepted(exact), strict=True):
        for key, tensor in named(sent).items():
            start = named_start(coded, sent.partition_id)[key]
            moved = named(true)[key] - start if codec.of_change else named(true)[key]
            off = (tensor - named(true)[key]).abs().max()
            assert off <= codec.error * moved.abs().max() * (1 + 1e-5) + 1e-6, key
    sizes = [t.numel() for r in exact.answered for t in sent_back(r.broadcast).values()]
    assert whole[0].bytes_up == 4 * sum(sizes)
    assert reports[0].bytes_up <= sum(map(codec.nbytes, sizes))
    assert reports[0].bytes_up == sum(map(codec.nbytes, sizes)) or upload == "segments"
    assert reports[0].bytes_down == whole[0].bytes_down


def sent_back(broadcast: Broadcast) -> dict[str, torch.Tensor]:
    """The tensors that come back."""
    return wire.to_peft(
        broadcast.adapters, broadcast.head, broadcast.trained & broadcast.uploaded, broadcast.modules
    )


def accepted(strategy: Remembers) -> list[ClientUpdate]:
    facts = strategy.rule.facts
    return [validate_reply(request, facts, weighted_by_key="num-examples") for request in strategy.answered]


def named(update: ClientUpdate) -> dict[str, torch.Tensor]:
    return wire.to_peft(update.adapters, update.head)


def named_start(strategy: Remembers, partition: int) -> dict[str, torch.Tensor]:
    (sent,) = (r.broadcast for r in strategy.answered if r.partition_id == partition)
    return wire.to_peft(sent.adapters, sent.head)


@every_codec
@pytest.mark.parametrize("wire_dtype", ["float32", "float16"])
def test_the_run_is_the_same_again_packed_or_not(upload: str, wire_dtype: str, tmp_path: Path) -> None:
    keys = {"upload": upload, "wire_dtype": wire_dtype}
    runs = [
        run("fedavg", tmp_path / str(n), packed=packed, **keys)
        for n, packed in enumerate((False, True, True))
    ]
    assert bits(runs[0][0]) == bits(runs[1][0]) == bits(runs[2][0])
    assert [r.bytes_up for r in runs[0][1]] == [r.bytes_up for r in runs[1][1]]


def test_rounds_and_clients_round_by_streams_of_their_own(tmp_path: Path) -> None:
    strategy, _ = run("fedavg", tmp_path, upload="int8")
    grid = FakeGrid(range(CLIENTS), Packed(tmp_path / "again"))
    strategy = FactorStrategy(strategies.make_rule("fedavg"), upload="int8", seed=3)
    strategy.start(grid, initial_arrays(), num_rounds=2)
    seeds = [message.content["config"]["upload-seed"] for message in grid.sent]
    trained = [m.content["config"]["upload-seed"] for m in grid.sent if m.metadata.message_type == "train"]
    assert len(set(trained)) == len(trained) == 2 * CLIENTS
    assert set(seeds) == set(trained)


def test_float32_is_what_it_was_and_says_nothing_in_the_orders(tmp_path: Path) -> None:
    plain, _ = run("fedavg", tmp_path / "plain")
    said, _ = run("fedavg", tmp_path / "said", upload="float32")
    assert bits(plain) == bits(said)
    assert not {"upload", "upload-seed"} & {k for r in said.answered for k in sent(r)}


def sent(request: object) -> set[str]:
    return {key for message in request.sent for key in message.content["config"]}  # type: ignore[attr-defined]


def test_a_reply_by_another_codec_is_refused(tmp_path: Path) -> None:
    class Other(ToyClient):
        def __call__(self, message: Message, partition: int) -> Message | None:
            message.content["config"]["upload"] = "int8"
            return super().__call__(message, partition)

    strategy = FactorStrategy(strategies.make_rule("fedavg"), upload="float16")
    with pytest.raises(RunFailed, match=r"are written as 'int8', asked for was 'float16'"):
        strategy.start(FakeGrid(range(CLIENTS), Other(tmp_path)), initial_arrays(), num_rounds=1)


def test_a_client_that_does_not_know_the_codec_says_which_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(wire.CODECS, "int2", replace(wire.CODECS["int4"], name="int2", width=2))  # type: ignore[type-var]
    strategy = FactorStrategy(strategies.make_rule("fedavg"), upload="int2")

    class Old(ToyClient):
        def __call__(self, message: Message, partition: int) -> Message | None:
            monkeypatch.delitem(wire.CODECS, "int2", raising=False)
            return super().__call__(message, partition)

    with pytest.raises(
        RunFailed, match=r"upload = 'int2': this client knows float32, float16, int8, int4, topk"
    ):
        strategy.start(FakeGrid(range(CLIENTS), Old(tmp_path)), initial_arrays(), num_rounds=1)


def test_an_unknown_codec_is_refused_before_anything_starts() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^upload = 'int2' .did you mean int.*: accepted are float32, .*, segments, changed, seeds$",
    ):
        strategies.FedAvg(upload="int2")


@pytest.mark.parametrize("upload", [name for name, codec in wire.CODECS.items() if codec.feedback])
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"strategy.name": "fedsvd"}, "which fedsvd would read in other coordinates"),
        (
            {"strategy.name": "fed-sb", "strategy.options": '{"subspace": "private"}'},
            "which fed-sb would read",
        ),
        ({"strategy.robust": "median"}, "strategy.robust = 'median' would cut off what is told late"),
        (
            {"privacy.mode": "client", "privacy.noise-multiplier": 1.0, "privacy.clipping-norm": 1.0},
            "privacy.mode = 'client' covers no updates that depend on each other",
        ),
    ],
)
def test_what_feedback_does_not_suit_is_refused_in_one_line(
    keys: dict[str, Any], words: str, upload: str
) -> None:
    with pytest.raises(NotApplicable, match=words) as error:
        check(tiny_config(**{"strategy.name": "fedavg", "lora.ranks": "4", "upload": upload, **keys}))
    assert "\n" not in str(error.value)


def local(config: RunConfig, path: Path, stop_after: int = 0, stop_in: int = 0) -> FederatedRun:
    """The rounds that are left, with clients in this process, broken off after a round, or within one."""

    def client(message: Message, partition: int) -> Message:
        node = Node(partition_id=partition, state_dir=path / "clients", simulation=True)
        order = wire.decode_instruction(message.content)
        if order.server_round == stop_in and partition > 0:
            raise KeyboardInterrupt
        reply = train_instruction(client_runtime(config), order, config, node)
        return Message(wire.encode_reply(reply, order), reply_to=message)

    def progress(record: dict[str, Any]) -> None:
        if record["round"] == stop_after:
            raise KeyboardInterrupt

    federation = federated(config, path, progress, resume=True)
    federation.run(FakeGrid(federation.partitions, client))
    return federation


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("upload", [name for name, codec in wire.CODECS.items() if codec.feedback])
def test_what_is_owed_goes_with_later_rounds_and_a_resumed_run_keeps_its_bits(
    upload: str, tmp_path: Path
) -> None:
    keys = {"strategy.name": "fedavg", "lora.ranks": "4", "num-server-rounds": 4, "partitions": "0,2"}
    config = tiny_config(**keys, **{"upload": upload, "train.local-steps": 1, "engine.device": "cpu"})
    whole = local(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        local(config, tmp_path / "stopped", stop_in=3)
    assert len(list((tmp_path / "stopped").rglob("owed-000003.safetensors"))) == 1
    resumed = local(config, tmp_path / "stopped")
    for name, tensor in wire.to_peft(whole.state.adapters, whole.state.head).items():
        assert torch.equal(tensor, wire.to_peft(resumed.state.adapters, resumed.state.head)[name]), name
    assert len(list((tmp_path / "whole").rglob("owed-*.safetensors"))) == 2 * 2
    for lost in (tmp_path / "whole").rglob("owed-000003.safetensors"):
        assert any(t.any() for t in load_file(lost).values())
    forgetful = tmp_path / "forgetful"
    with pytest.raises(KeyboardInterrupt):
        local(config, forgetful, stop_after=2)
    for kept in forgetful.rglob("owed-*.safetensors"):
        kept.unlink()
    again = local(config, forgetful)
    assert not torch.equal(again.state.head["classifier.weight"], whole.state.head["classifier.weight"])


@pytest.mark.parametrize(("name", "moves"), [("FedAvg", False), ("FedExLoRA", True), ("FLoRA", True)])
def test_anybodys_app_sends_floats_and_with_the_mod_fewer_bytes(
    name: str, moves: bool, tmp_path: Path
) -> None:
    up, upload = {}, "int8" if moves else "segments"
    for mod in (False, True):
        model = peft_model()
        mods = [base_mod(lambda context, m=model: m, tmp_path / str(mod))] if moves else []
        app: ClientApp = plain_app(model, "", [*mods, *([upload_mod] if mod else [])])
        strategy = getattr(strategies, name)(scaling=ALPHA / RANK, upload=upload, fraction_evaluate=0.0)
        reports = watched(strategy)
        federate(strategy, app, model, rounds=2)
        assert [report.refused for report in reports] == [{}] * 2
        up[mod] = reports[0].bytes_up
    if moves:
        assert 0.25 < up[True] / up[False] < 0.30
    else:
        assert 0.06 < up[True] / up[False] < 0.10


def test_the_mod_keeps_what_is_owed_in_the_apps_context() -> None:
    """Every number grows by one a round; each of four rounds tells of another quarter all of its growth."""
    app, state = ClientApp(mods=[upload_mod]), RecordDict()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        grown = {name: t + 1 for name, t in wire.from_record(message.content["arrays"]).items()}
        content = RecordDict({"arrays": wire.to_record(grown), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    def client(message: Message, partition: int) -> Message:
        return app(message, Context(run_id=1, node_id=1, node_config={}, state=state, run_config={}))

    strategy, start = strategies.FedAvg(upload="segments", fraction_evaluate=0.0), initial_arrays()
    strategy.start(FakeGrid([0], client), start, num_rounds=4)
    found, before = strategy.arrays().to_torch_state_dict(), start.to_torch_state_dict()
    for name, tensor in before.items():
        grown = (found[name] - before[name]).reshape(-1)
        quarters = grown.split(-(-tensor.numel() // 4))
        for quarter, turn in zip(quarters, (4, 1, 2, 3), strict=False):
            assert torch.allclose(quarter, torch.full_like(quarter, turn), atol=0.1), name
    assert sorted(state.array_records) == ["owed-1-000003", "owed-1-000004"]
