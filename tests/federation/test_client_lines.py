"""The table in ``docs/flower.md``: a plain PEFT client and exactly those lines, under every strategy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

import strategies
from fedlora.errors import RunFailed
from strategies import FedSALoRA, FedSVD, HetLoRA
from strategies.flower import FactorStrategy
from tests.federation.small import watched
from tests.federation.test_anybodys_app import ALPHA, CLIENTS, INPUTS, RANK, federate, peft_model
from tests.federation.test_strategy import NAMED

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "flower.md").read_text().split("## What a client must add")[1]
PLAIN, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.S)
BLOCKS = re.findall(r"\*\*(\w+)\*\*:.*?```python\n(.*?)```", PAGE, re.S)
LINES = {name: [line for line in block.splitlines() if line] for name, block in BLOCKS}
ROWS = re.findall(r"^\| (`.*?) \| (\S+) \| (.*?) ?\|$", PAGE, re.M)
TABLE = {
    name: (lines, [w for w in which.split(", ") if w in LINES])
    for names, lines, which in ROWS
    for name in re.findall(r"`(\w+)`", names)
}
REFUSAL = {"freeze": "train_as_ordered", "keep": "own_mod", "move": "base_mod"}


def with_lines(lines: list[str]) -> str:
    """The plain client and these lines, each where the page says."""
    text = PLAIN
    for line in lines:
        if line.startswith("from "):
            text = f"{line}\n{text}"
        elif line.startswith("app = "):
            assert "app = ClientApp()\n" in text
            text = text.replace("app = ClientApp()\n", f"{line}\n")
        else:
            text = re.sub(r"(    set_peft_model_state_dict\(.*\n)", rf"\1{line}\n", text)
    return text


def fit(model: PeftModel, context: Context) -> tuple[float, int]:
    """A few steps of AdamW on data of the client's own."""
    partition = int(context.node_config["partition-id"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    labels = (torch.arange(4) + partition) % 3
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=(INPUTS + partition) % 50, labels=labels).loss
        loss.backward()
        optimizer.step()
    return float(loss.detach()), partition + 1


def app_of(model: PeftModel, lines: list[str]) -> ClientApp:
    given: dict[str, Any] = {
        "ArrayRecord": ArrayRecord, "Context": Context, "Message": Message, "MetricRecord": MetricRecord,
        "RecordDict": RecordDict, "ClientApp": ClientApp, "fit": fit, "own_model": lambda context: model,
        "get_peft_model_state_dict": get_peft_model_state_dict,
        "set_peft_model_state_dict": set_peft_model_state_dict,
    }  # fmt: skip
    exec(with_lines(lines), given)
    app: ClientApp = given["app"]
    return app


def run(named: type[FactorStrategy], lines: list[str]) -> tuple[set[str], list[Any]]:
    """The arrays that three rounds changed, and the rounds' reports."""
    model = peft_model()
    strategy = named(scaling=ALPHA / RANK, fraction_evaluate=0.0)
    reports = watched(strategy)
    before = {k: t.clone() for k, t in get_peft_model_state_dict(model).items()}
    after = federate(strategy, app_of(model, lines), model, rounds=3).to_torch_state_dict()
    changed = {k for k, t in after.items() if t.shape != before[k].shape or not torch.equal(t, before[k])}
    return changed, reports


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_table_has_every_strategy_once_and_counts_its_lines() -> None:
    assert sorted(TABLE) == sorted(named.__name__ for named in NAMED)
    assert sorted(LINES) == sorted(REFUSAL)
    for name, (lines, which) in TABLE.items():
        assert lines == ("-" if name == "FedSB" else str(sum(len(LINES[w]) for w in which)))


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"FedSB"}))
def test_with_its_lines_a_plain_client_takes_part_in_every_round(name: str) -> None:
    lines = [line for which in TABLE[name][1] for line in LINES[which]]
    named = getattr(strategies, name)
    changed, reports = run(named, lines)
    assert [report.refused for report in reports] == [{}] * 3
    assert [report.participants for report in reports] == [list(range(CLIENTS))] * 3
    assert all(np.isfinite(report.train_loss) for report in reports)
    assert any("classifier" in key for key in changed)
    assert any("lora_" in key for key in changed) == bool(named.rule_type.facts.uploaded)


WITHOUT = [(name, which) for name, (_, needed) in sorted(TABLE.items()) for which in needed]


@pytest.mark.parametrize(("name", "without"), WITHOUT)
def test_without_a_line_the_first_round_says_which(name: str, without: str) -> None:
    lines = [line for which in TABLE[name][1] if which != without for line in LINES[which]]
    with pytest.raises(RunFailed, match=rf"^round 1: 0 valid updates, .*{REFUSAL[without]}") as error:
        run(getattr(strategies, name), lines)
    assert "\n" not in str(error.value)


def test_fed_sb_says_that_it_is_for_fedloras_clients() -> None:
    with pytest.raises(RunFailed, match=r"^round 1: .*Fed-SB trains a core .* need fedlora's ClientApp"):
        run(strategies.FedSB, [])


def test_hetlora_prunes_plain_clients_and_keeps_them() -> None:
    """Their models keep rank 4; what is pruned in a round arrives as zeros in all later ones."""
    sent: list[dict[str, torch.Tensor]] = []
    model = peft_model()
    strategy = HetLoRA(scaling=ALPHA / RANK, gamma=0.5, min_rank=1, fraction_evaluate=0.0)
    reports = watched(strategy)
    app = app_of(model, [])

    def shrinking(message: Message, context: Context) -> Message:
        sent.append(message.content["arrays"].to_torch_state_dict())
        assert message.content["config"]["rank"] == RANK
        reply = app(message, context)
        arrays = reply.content["arrays"].to_torch_state_dict()
        for name in (name for name in arrays if "lora_B" in name):
            arrays[name][:, 1:] = 0.5 * sent[-1][name][:, 1:]
        reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    initial = get_peft_model_state_dict(model)
    for name in (name for name in initial if "lora_B" in name):
        initial[name][:] = 1.0  # a fresh adapter has no tail that could shrink
    set_peft_model_state_dict(model, initial)
    federate(strategy, shrinking, model, rounds=3)  # type: ignore[arg-type]
    assert all(report.refused == {} for report in reports)
    state = strategy.state
    assert state is not None
    assert {k: int(rank) for k, rank in state.memory.items()} == {f"rank/{p}": 1 for p in range(CLIENTS)}
    for server_round, rank in ((1, 4), (2, 2), (3, 1)):
        for name, tensor in sent[CLIENTS * server_round - 1].items():
            rows = {"lora_A": tensor, "lora_B": tensor.T}.get(name.split(".")[-2], torch.ones(RANK, 1))
            if "lora_" in name:
                assert [bool(row.any()) for row in rows] == [True] * rank + [False] * (RANK - rank)


def test_fedsas_clients_find_their_own_b_again() -> None:
    """Also where they evaluate, and after a round that they sat out."""
    kinds: set[str] = set()
    model = peft_model()
    app = app_of(model, LINES["keep"])

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(
            RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.0})}), reply_to=message
        )

    trained: dict[int, dict[str, torch.Tensor]] = {}

    def watched(message: Message, context: Context) -> Message:
        reply = app(message, context)
        given = message.content["arrays"].to_torch_state_dict()  # as the mod completed it
        partition = int(context.node_config["partition-id"])
        if partition in trained:
            assert all(torch.equal(given[k], trained[partition][k]) for k in given if "lora_B" in k)
        if message.metadata.message_type == "train":
            trained[partition] = {k: t.clone() for k, t in get_peft_model_state_dict(model).items()}
            assert not any("lora_B" in key for key in reply.content["arrays"])
        kinds.add(message.metadata.message_type)
        return reply

    strategy = FedSALoRA(scaling=ALPHA / RANK, fraction_train=0.67, seed=1)
    federate(strategy, watched, model, rounds=4)  # type: ignore[arg-type]
    assert kinds == {"train", "evaluate"}
    assert len(trained) == CLIENTS


@pytest.mark.parametrize(("dtype", "server_round"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_an_adapter_that_cannot_hold_frozen_factors_is_told_so(dtype: torch.dtype, server_round: int) -> None:
    model = peft_model().to(torch.float32)
    app = app_of(model, LINES["freeze"])

    def rounding(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"].to_torch_state_dict()
        message.content["arrays"] = ArrayRecord({k: t.to(dtype).float() for k, t in arrays.items()})
        reply = app(message, context)
        wire = torch.float16 if dtype == torch.float16 else torch.float32
        found = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({k: t.to(dtype).to(wire) for k, t in found.items()})
        return reply

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype).float()
    words = f"round {server_round}: 0 valid updates.*lora_A comes back in {str(dtype)[6:]}"
    with pytest.raises(RunFailed, match=words):
        federate(FedSVD(scaling=ALPHA / RANK, fraction_evaluate=0.0), rounding, model, rounds=3)  # type: ignore[arg-type]
    if dtype == torch.float16:
        strategy = FedSVD(scaling=ALPHA / RANK, fraction_evaluate=0.0, wire_dtype="float16")
        federate(strategy, rounding, model, rounds=3)  # type: ignore[arg-type]
        assert strategy.report.refused == {}
