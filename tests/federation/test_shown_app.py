"""The app in ``docs/flower.md``, word for word: its last loss is that of a dense computation."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.seeding import derive
from fedlora.core.state import ModuleSpec
from tests.docs_commands import ROOT
from tests.e2e.test_flwr_run import flower as flower
from tests.e2e.test_flwr_run import wait_for_status
from tests.federation.fake_grid import FakeGrid

PAGE = (ROOT / "docs" / "flower.md").read_text()
FILES = dict(re.findall(r"^`([\w/]+\.\w+)`[^\n]*(?:\n[^\n`]+)*\n\n```\w+\n(.*?)^```", PAGE, re.S | re.M))
RANK, SCALING, ROUNDS, CLIENTS, LEARNING_RATE = 8, 2.0, 3, 3, 0.02
WORDS = re.findall(r"\w+", "the a cat dog bird sees hears likes small big red old house tree river and")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The files of the page, and a tiny random model and texts for it."""
    for name, text in FILES.items():
        path = tmp_path / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "app" / "flora_app" / "__init__.py").touch()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS) + 1, num_key_value_heads=1, initializer_range=0.3, **size)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    level = Tokenizer(WordLevel({w: i for i, w in enumerate(["[unk]", *WORDS])}, unk_token="[unk]"))
    level.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=level, unk_token="[unk]").save_pretrained(tmp_path / "model")
    lines = [" ".join(WORDS[(i * 7 + j * (i % 3 + 1)) % len(WORDS)] for j in range(6)) for i in range(10)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "app"


def run_config(app: Path) -> dict[str, str | int | float]:
    there = app.parent
    return {
        "num-server-rounds": ROUNDS, "learning-rate": LEARNING_RATE, "model": str(there / "model"),
        "texts": str(there / "texts.txt"), "output": str(there / "final"),
    }  # fmt: skip


def dense_loss(base: LlamaForCausalLM, texts: list[Tensor]) -> tuple[float, float]:
    """The loss before and after FLoRA, with (out, in) weights and no adapter, mod, patch or message."""
    names = [n for n, _ in base.named_modules() if n.endswith(("q_proj", "v_proj"))]
    weights = {n: base.get_submodule(n).weight.detach().clone() for n in names}
    specs = {n: ModuleSpec(out_features=w.shape[0], in_features=w.shape[1]) for n, w in weights.items()}

    def loss(ids: Tensor, changed: dict[str, Tensor]) -> Tensor:
        named = {f"{n}.weight": w for n, w in changed.items()}
        return functional_call(base, named, (), {"input_ids": ids, "labels": ids}).loss

    def mean() -> float:
        with torch.no_grad():
            return sum(loss(ids, weights).item() for ids in texts) / len(texts)

    before = mean()
    for server_round in range(1, ROUNDS + 1):
        total = {n: torch.zeros_like(w) for n, w in weights.items()}
        for partition in range(CLIENTS):
            own = texts[partition::CLIENTS]
            seed = derive(0, "fresh-adapter", server_round, partition)
            start = fresh_adapters(specs, RANK, SCALING, seed, "kaiming")
            A = {n: f.A.clone().requires_grad_() for n, f in start.items()}
            B = {n: torch.zeros_like(f.B).requires_grad_() for n, f in start.items()}
            optimizer = torch.optim.AdamW([*A.values(), *B.values()], lr=LEARNING_RATE)
            for ids in own:
                loss(ids, {n: w + SCALING * B[n] @ A[n] for n, w in weights.items()}).backward()
                optimizer.step()
                optimizer.zero_grad()
            for n in names:
                total[n] += len(own) / len(texts) * SCALING * (B[n] @ A[n]).detach()
        weights = {n: w + total[n] for n, w in weights.items()}
    return before, mean()


def check_outcome(app: Path, task: ModuleType) -> None:
    name = str(app.parent / "model")
    texts = task.load_texts(name, str(app.parent / "texts.txt"))
    before, after = dense_loss(AutoModelForCausalLM.from_pretrained(name), texts)
    losses = json.loads((app.parent / "final" / "losses.json").read_text())
    assert losses[str(ROUNDS)] == pytest.approx(after, rel=1e-4)
    assert after < before - 0.1
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), app.parent / "final")
    assert task.mean_loss(saved, texts) == pytest.approx(after, rel=1e-4)


@pytest.fixture
def modules(app: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(app))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flora_app"]:
        monkeypatch.delitem(sys.modules, name)
    return {n: importlib.import_module(f"flora_app.{n}") for n in ("task", "client_app", "server_app")}


def test_the_page_shows_a_whole_app() -> None:
    assert sorted(FILES) == [
        "flora_app/client_app.py", "flora_app/server_app.py", "flora_app/task.py", "pyproject.toml",
    ]  # fmt: skip


def test_the_app_in_this_process_is_the_dense_computation(app: Path, modules: dict[str, ModuleType]) -> None:
    def context(node: int) -> Context:
        node_config = {"partition-id": node, "num-partitions": CLIENTS}
        return Context(1, node, node_config, RecordDict(), run_config(app))  # type: ignore[arg-type]

    def client(message: Message, partition: int) -> Message:
        return modules["client_app"].app(message, context(partition))

    grid = FakeGrid(range(CLIENTS), client, tells_partitions=False)
    modules["server_app"].app(grid, context(0))
    check_outcome(app, modules["task"])


@pytest.mark.deployed
def test_the_app_under_flwr_run_is_the_dense_computation(
    app: Path, flower: dict[str, str], modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    lines = [f"{k} = {json.dumps(v)}" for k, v in run_config(app).items()]
    (tmp_path / "run.toml").write_text("\n".join(lines) + "\n")
    environment = {**flower, "HOME": str(tmp_path / "home")}
    subprocess.run(
        ["flwr", "run", ".", "--federation-config", f"num-supernodes={CLIENTS} client-resources-num-cpus=1",
         "--run-config", str(tmp_path / "run.toml")],
        cwd=app, env=environment, check=True, timeout=240,
    )  # fmt: skip
    assert wait_for_status(environment, app) == "finished:completed"
    check_outcome(app, modules["task"])
