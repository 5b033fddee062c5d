"""Whole paths of people who use fedlora, by its commands, on models that take seconds.

The maintainer of a Flower app has theirs in `tests.federation.test_shown_app`.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fedlora
from fedlora.cli import cli
from tests.docs_commands import ROOT, blocks
from tests.models.families import save

SMALL = ("--set", "engine.name=in-process", "--set", "num-server-rounds=1", "--set", "train.local-steps=2")


def done(*command: object, given: str = "") -> str:
    outcome = CliRunner().invoke(cli, list(map(str, command)), input=given)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [f"{'good' if n % 3 else 'bad'} film {n},{5 if n % 3 else 1}" for n in range(90)]
    (tmp_path / "reviews.csv").write_text("review,stars\n" + "\n".join(rows) + "\n")
    return tmp_path


def test_a_doctoral_student_compares_an_own_method_on_an_own_file(here: Path) -> None:
    (own,) = [body for body in blocks((ROOT / "docs" / "strategy.md").read_text(), "python")
              if "class DampedRule" in body]  # fmt: skip
    (here / "damped.py").write_text(own)
    done("init", "mine", "--data", "reviews.csv", "--model", "tiny", "--clients", 3)
    assert "clients   3, 3 in a round" in done("run", "mine/run.toml", "--dry-run")
    study = ("--set", "study.strategies=fedavg,damped:DampedRule", "--set", "study.seeds=1,2")
    printed = done("compare", "mine/run.toml", *SMALL, *study, "--out", "runs")
    assert printed.rstrip().endswith("report: runs/report.html")
    table = fedlora.load_study("runs").table()
    assert {row[0] for row in table.cells()[1]} == {"fedavg", "DampedRule"}
    assert r"\toprule" in table.latex()
    page = (here / "runs" / "report.html").read_text()
    assert "No LoRA strategy was run" not in page
    assert "DampedRule" in page.partition("What holds")[0]


def test_an_engineer_brings_a_chat_model_and_takes_adapters_home(here: Path) -> None:
    base = save(here / "base", "llama", "CausalLM")
    (here / "talks.jsonl").write_text(
        "".join(f'{{"text": "the day was fine, number {n}"}}\n' for n in range(40))
    )
    done("init", "mine", "--data", "talks.jsonl", "--task", "causal-lm", "--model", base, "--max-length", 16)
    done("run", "mine/run.toml", *SMALL, "--out", "run")
    alone = AutoPeftModelForCausalLM.from_pretrained(here / "run" / "adapter")
    done("aggregate", "run/adapter", "--strategy", "fedavg", "--merge", "--out", "merged")
    merged = AutoModelForCausalLM.from_pretrained(here / "merged")
    batch = AutoTokenizer.from_pretrained(here / "run" / "adapter")("the day", return_tensors="pt")
    ids = {"input_ids": batch["input_ids"]}
    assert (alone(**ids).logits - merged(**ids).logits).abs().max() < 1e-4
    said = json.loads(done("predict", "run/adapter", "the day was", "--max-new-tokens", 3, "--json"))
    assert (said["given"], type(said["written"])) == ("the day was", str)


@pytest.mark.deployed
def test_a_steward_limits_what_is_spent_and_reads_what_left(here: Path) -> None:
    for name in "ab":
        (here / f"{name}.csv").write_text(
            (here / "reviews.csv").read_text().replace("review,stars", "text,label")
        )
    done("federation", "init", "net", "--nodes", 2, "--data", "a.csv", "--data", "b.csv")
    for node in ("node-0", "node-1"):
        file = here / "net" / "nodes" / node / "node.toml"
        settings = tomllib.loads(file.read_text())
        limit = {"max-epsilon": 5.0 if node == "node-0" else 0.5}
        file.write_text(tomli_w.dumps(settings | limit))
        assert "90 examples" in done("federation", "check", f"net/nodes/{node}")
    (here / "run.toml").write_text(tomli_w.dumps({
        "num-server-rounds": 1, "min-available-nodes": 2, "partitions": "0-1", "model": {"name": "tiny"},
        "data": {"name": str(here / "a.csv"), "partitioner": "iid", "num-partitions": 2},
        "train": {"local-steps": 2},
        "privacy": {"mode": "example", "target-epsilon": 4.0, "target-delta": 1e-5},
    }))  # fmt: skip
    done("federation", "up", "net", "--detach")
    try:
        done("run", "run.toml", "--federation", "net", "--out", "run")
    finally:
        done("federation", "down", "net")
    (record,) = fedlora.load_run("run").records
    assert record["participants"] == [0]
    (declined,) = json.loads(done("node", "log", "net/nodes/node-1", "--declined", "--json"))
    assert "2 steps would spend" in declined["reason"]
