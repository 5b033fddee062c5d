"""``fedlora evaluate --lm-eval``: how the harness is called, and what is said where it cannot be."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from fedlora.cli import cli
from fedlora.config import ModelConfig
from fedlora.core.state import State
from fedlora.models import AdapterCard
from fedlora.models.export import save_adapter
from tests.models.language import VOCABULARY, adapted_lm, save_tiny_lm
from tests.models.samples import logits, random_adapters, token_batch


def fedlora(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *arguments])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter", str(save_tiny_lm(tmp_path / "base", "llama")))


def saved(path: Path, name: str, task: str = "causal-lm") -> Path:
    model = adapted_lm(name)
    state = State(round=1, adapters=random_adapters(model.modules, 2), head={})
    card = AdapterCard(model=ModelConfig(name=name), label_names=(), max_length=32, seed=0, task=task)
    save_adapter(path, state, {}, card)
    return path


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for lm-eval: records how it is called and loads the model as its ``hf`` does."""
    called: dict[str, Any] = {}

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        called.update(arguments)
        given = arguments["model_args"]
        base = AutoModelForCausalLM.from_pretrained(given["pretrained"], dtype=given["dtype"])
        called["logits"] = logits(
            PeftModel.from_pretrained(base, given["peft"]).eval(), token_batch(VOCABULARY)
        )
        metrics = {
            "name": "a", "alias": "a", "sample_len": 5,
            "acc,none": 0.25, "acc_stderr,none": "N/A", "f1,strict": 1,
        }  # fmt: skip
        group = {"name": "group", "alias": "group", "sample_len": 10}
        return {"results": {"group": group, **dict.fromkeys(arguments["tasks"], metrics)}}

    module = ModuleType("lm_eval")
    module.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return called


def test_the_harness_gets_the_exported_adapter(adapter: Path, harness: dict[str, Any]) -> None:
    result = fedlora(str(adapter), "--lm-eval", "hellaswag, arc_easy", "--limit", "5", "--json")
    assert result.exit_code == 0, result.stderr
    one = {"acc": 0.25, "f1,strict": 1.0}
    assert json.loads(result.stdout) == {"hellaswag": one, "arc_easy": one}
    assert (harness["model"], harness["tasks"], harness["limit"]) == ("hf", ["hellaswag", "arc_easy"], 5)
    model = adapted_lm(str(adapter.parent / "base"))
    model.load(random_adapters(model.modules, 2), {})
    torch.testing.assert_close(harness["logits"], logits(model.module, token_batch(VOCABULARY)))


def test_people_read_one_line_for_each_task(adapter: Path, harness: dict[str, Any]) -> None:
    assert fedlora(str(adapter), "--lm-eval", "piqa").stdout == "piqa: acc 0.2500, f1,strict 1.0000\n"
    assert harness["limit"] is None


def test_a_harness_that_gives_up_is_one_line(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lm_eval")
    module.simple_evaluate = lambda **_: {}["nothing"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    result = fedlora(str(adapter), "--lm-eval", "nothing")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: --lm-eval 'nothing': the harness failed (KeyError: 'nothing')\n",
    )


def test_without_the_harness_one_line_says_so(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = fedlora(str(adapter), "--lm-eval", "piqa")
    line = "error: --lm-eval 'piqa': lm-eval is not installed here (pip install 'lm-eval[hf]')\n"
    assert (result.exit_code, result.stderr) == (2, line)


def test_what_the_harness_cannot_load_is_refused(tmp_path: Path, harness: dict[str, Any]) -> None:
    for name, task in (("tiny-lm", "causal-lm"), ("minilm", "classification")):
        path = saved(tmp_path / task, "tiny-lm")
        card = AdapterCard(
            model=ModelConfig(name=name), label_names=("a", "b"), max_length=32, seed=0, task=task
        )
        card.write(path)
        result = fedlora(str(path), "--lm-eval", "piqa")
        assert result.exit_code == 2
        assert (
            f"of {name!r} for {task}, the harness takes adapters of language models that have"
            in result.stderr
        )
    assert not harness


def test_an_adapter_of_a_quantised_base_is_not_measured_on_the_whole_one(
    adapter: Path, harness: dict[str, Any]
) -> None:
    card = AdapterCard.read(adapter)
    replace(card, model=replace(card.model, quantization="4bit")).write(adapter)
    result = fedlora(str(adapter), "--lm-eval", "piqa")
    assert result.exit_code == 2
    assert "is of a base with model.quantization = '4bit', the harness would measure it" in result.stderr
    assert not harness


WORDS = ("all", "happy", "families", "are", "alike")


def save_words(directory: Path) -> None:
    """A tokenizer that knows a few words; as many as the model, else the harness cuts the embedding."""
    others = (f"word-{number}" for number in range(VOCABULARY - 3 - len(WORDS)))
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", *WORDS, *others))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed here")
def test_the_real_harness_measures_what_the_federated_model_says(adapter: Path, tmp_path: Path) -> None:
    base = adapter.parent / "base"
    save_words(base)
    texts = ["happy families are all alike", "all are happy"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "texts.yaml").write_text(
        json.dumps(
            {
                "task": "own_texts",
                "dataset_path": "json",
                "dataset_kwargs": {
                    "data_files": {"test": str(tmp_path / "texts.jsonl")},
                    "cache_dir": str(tmp_path / "cache"),
                },
                "test_split": "test",
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}],
            }
        )
    )
    result = fedlora(str(adapter), "--lm-eval", str(tmp_path / "texts.yaml"), "--json")
    assert result.exit_code == 0, result.stderr
    model = adapted_lm(str(base))
    model.load(random_adapters(model.modules, 2), {})
    log_likelihood = 0.0
    for text in texts:
        ids = torch.tensor([1, *(3 + WORDS.index(word) for word in text.split())])
        with torch.no_grad():
            found = model.module(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        log_likelihood += found[torch.arange(len(ids) - 1), ids[1:]].sum().item()
    expected = math.exp(-log_likelihood / sum(len(text.split()) for text in texts))
    assert json.loads(result.stdout)["own_texts"] == {"word_perplexity": pytest.approx(expected, rel=1e-5)}


def test_one_of_data_and_tasks_is_named(adapter: Path) -> None:
    for arguments in ((), ("synthetic", "--lm-eval", "piqa")):
        result = fedlora(str(adapter), *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(
            "error: fedlora evaluate: name a dataset after the adapter, or tasks by"
        )
    assert "must name tasks" in fedlora(str(adapter), "--lm-eval", ",").stderr
