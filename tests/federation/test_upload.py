"""``upload``: fewer bytes up under every rule, and the server goes on from what clients wrote down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

import strategies
from clients import base_mod, upload_mod
from fedlora import wire
from fedlora.core.state import ClientUpdate
from fedlora.errors import ConfigError, RunFailed
from strategies.flower import FactorStrategy
from strategies.replies import validate_reply
from strategies.report import RoundReport
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import MODULES, bits, initial_arrays, watched
from tests.federation.test_anybodys_app import ALPHA, RANK, federate, peft_model, plain_app

CLIENTS = 3
every_codec = pytest.mark.parametrize("upload", wire.CODECS)


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


def run(
    name: str, path: Path, *, packed: bool = False, rounds: int = 2, **options: str
) -> tuple[FactorStrategy, list[RoundReport]]:
    rule = strategies.make_rule(name)
    strategy = FactorStrategy(rule, scaling=2.0, seed=3, fraction_evaluate=0.0, packed=packed, **options)
    reports = watched(strategy)
    strategy.start(FakeGrid(range(CLIENTS), Packed(path)), initial_arrays(), num_rounds=rounds)
    assert [report.refused for report in reports] == [{}] * rounds
    return strategy, reports


@every_codec
@pytest.mark.parametrize("name", strategies.RULES)
def test_under_every_rule_what_counts_is_what_was_written_down(
    name: str, upload: str, tmp_path: Path
) -> None:
    """One round: each accepted tensor is off by what the codec declares, and the bytes are the codec's."""
    codec = wire.CODECS[upload]
    exact, whole = run(name, tmp_path / "exact", rounds=1)
    coded, reports = run(name, tmp_path / "coded", upload=upload, rounds=1)
    for sent, true in zip(accepted(coded), accepted(exact), strict=True):
        for key, tensor in named(sent).items():
            start = named_start(coded, sent.partition_id)[key]
            moved = named(true)[key] - start if codec.of_change else named(true)[key]
            off = (tensor - named(true)[key]).abs().max()
            assert off <= codec.error * moved.abs().max() * (1 + 1e-5) + 1e-6, key
    numbers, tensors = whole[0].bytes_up // 4, 2 * len(MODULES) + 1
    most = codec.bits * numbers / 8 + 4 * tensors * CLIENTS  # groups that are not full
    assert codec.bits * numbers / 8 <= reports[0].bytes_up <= most
    assert reports[0].bytes_down == whole[0].bytes_down


def accepted(strategy: FactorStrategy) -> list[ClientUpdate]:
    facts = strategy.rule.facts
    return [
        validate_reply(request, facts, weighted_by_key="num-examples")
        for request in strategy.transport.requests
    ]


def named(update: ClientUpdate) -> dict[str, torch.Tensor]:
    return wire.to_peft(update.adapters, update.head)


def named_start(strategy: FactorStrategy, partition: int) -> dict[str, torch.Tensor]:
    (sent,) = (r.broadcast for r in strategy.transport.requests if r.partition_id == partition)
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
    assert not {"upload", "upload-seed"} & {k for r in said.transport.requests for k in sent(r)}


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
    monkeypatch.setitem(wire.CODECS, "int4", replace(wire.CODECS["int8"], name="int4"))  # type: ignore[type-var]
    strategy = FactorStrategy(strategies.make_rule("fedavg"), upload="int4")

    class Old(ToyClient):
        def __call__(self, message: Message, partition: int) -> Message | None:
            monkeypatch.delitem(wire.CODECS, "int4", raising=False)
            return super().__call__(message, partition)

    with pytest.raises(RunFailed, match=r"upload = 'int4': this client knows float32, float16, int8"):
        strategy.start(FakeGrid(range(CLIENTS), Old(tmp_path)), initial_arrays(), num_rounds=1)


def test_an_unknown_codec_is_refused_before_anything_starts() -> None:
    with pytest.raises(
        ConfigError, match=r"^upload = 'int4' \(did you mean int8\?\): accepted are float32, .*, int8$"
    ):
        strategies.FedAvg(upload="int4")


@pytest.mark.parametrize(("name", "moves"), [("FedAvg", False), ("FedExLoRA", True), ("FLoRA", True)])
def test_anybodys_app_sends_floats_and_with_the_mod_fewer_bytes(
    name: str, moves: bool, tmp_path: Path
) -> None:
    up = {}
    for mod in (False, True):
        model = peft_model()
        mods = [base_mod(lambda context, m=model: m, tmp_path / str(mod))] if moves else []
        app: ClientApp = plain_app(model, "", [*mods, *([upload_mod] if mod else [])])
        strategy = getattr(strategies, name)(scaling=ALPHA / RANK, upload="int8", fraction_evaluate=0.0)
        reports = watched(strategy)
        federate(strategy, app, model, rounds=2)
        assert [report.refused for report in reports] == [{}] * 2
        up[mod] = reports[0].bytes_up
    assert 0.25 < up[True] / up[False] < 0.30
