"""Bad input is one line with exit code 2, and no output directory is left, whole or half."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.config import ModelConfig
from fedlora.models import AdapterCard
from fedlora.models.export import save_adapter as export
from tests.aggregate.saved import aggregate, edit_config, refused
from tests.models.samples import adapted
from tests.models.test_export import card_of, state_of

Q = "base_model.model.model.layers.0.self_attn.q_proj."
Change = Callable[[Path], Any]


def config(**fields: Any) -> Change:
    return lambda adapter: edit_config(adapter, **fields)


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    def edit(adapter: Path) -> None:
        found = dict(load_file(adapter / "adapter_model.safetensors"))
        change(found)
        save_file({name: t.contiguous() for name, t in found.items()}, adapter / "adapter_model.safetensors")

    return edit


def add(name: str, *shape: int) -> Change:
    return tensors(lambda found: found.__setitem__(name, torch.ones(shape)))


def drop(*names: str) -> Change:
    return tensors(lambda found: [found.pop(name) for name in names])


def text(content: bytes) -> Change:
    return lambda adapter: (adapter / "adapter_config.json").write_bytes(content)


def filled(value: float, dtype: torch.dtype = torch.float32) -> Change:
    return tensors(lambda f: f.__setitem__(f"{Q}lora_A.weight", torch.full((4, 16), value, dtype=dtype)))


NOT_PLAIN: Mapping[str, tuple[Change, str]] = {
    "DoRA": (config(use_dora=True), "use_dora = true: only plain LoRA"),
    "biases": (config(bias="lora_only"), "bias = 'lora_only'"),
    "a bias of B": (config(lora_bias=True), "lora_bias"),
    "another method": (config(peft_type="IA3"), "peft_type = 'IA3'"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
    "OLoRA": (config(init_lora_weights="olora"), "'olora' moves the base"),
    "LoftQ": (config(init_lora_weights="loftq"), "'loftq' moves the base"),
    "CorDA": (config(init_lora_weights="corda"), "'corda' moves the base"),
    "a method of tomorrow": (config(use_magic={"a": 1}), 'use_magic = {"a": 1}: PEFT'),
    "single tokens": (config(trainable_token_indices=[1]), "trainable_token_indices"),
    "an embedding": (add("base_model.model.model.embed_tokens.lora_embedding_A", 4, 50), "embed_tokens"),
    "a magnitude": (add(f"{Q}lora_magnitude_vector", 16), "lora_magnitude_vector"),
    "a convolution": (add(f"{Q}lora_A.weight", 4, 16, 1, 1), "only linear layers"),
    "our own core": (add(f"{Q}lora_R.weight", 4, 4), "lora_R"),
    "saved embeddings": (add("base_model.model.model.embed_tokens.weight", 50, 16), "neither a LoRA factor"),
}
DAMAGED: Mapping[str, tuple[Change, str]] = {
    "a NaN": (filled(float("nan")), "q_proj.lora_A.weight holds a NaN"),
    "an infinity in bfloat16": (filled(float("inf"), torch.bfloat16), "holds a NaN or an infinity"),
    "too large a product": (filled(1e30), "too large for float32"),
    "integers": (filled(1, torch.int8), "torch.int8: only floating point"),
    "an A without its B": (drop(f"{Q}lora_B.weight"), "q_proj has no lora_B"),
    "a missing module": (drop(f"{Q}lora_A.weight", f"{Q}lora_B.weight"), "targets model.layers.0"),
    "nothing at all": (tensors(lambda found: found.clear()), "holds no lora_A"),
    "foreign names": (add("q_proj.lora_A.weight", 4, 16), "begin with base_model.model."),
    "another rank than it says": (config(r=8), "rank 8 that the configuration says"),
    "unequal ranks of A and B": (add(f"{Q}lora_B.weight", 16, 3), "q_proj"),
    "a head that is not there": (
        config(modules_to_save=["lm_head"]),
        "modules_to_save names lm_head, of which it holds no tensor",
    ),
    "no alpha": (config(lora_alpha=None), "lora_alpha = None"),
    "an alpha of 0": (config(lora_alpha=0), "alpha = 0"),
    "an endless alpha": (config(alpha_pattern={"q_proj": 10**400}), "too large"),
    "a pattern that is none": (config(rank_pattern={"(": 3}), "unterminated"),
    "a rank in words": (config(rank_pattern={"q_proj": "four"}), "q_proj = 'four'"),
    "targets of no kind": (config(target_modules=5), "adapter_config.json: not what PEFT writes"),
    "no JSON": (text(b"{"), "not JSON"),
    "no object": (text(b"[]"), "not a JSON object"),
    "endless JSON": (text(b"[" * 100_000), "not JSON"),
    "bytes": (text(b"\xff\xfe"), "not JSON"),
    "no configuration": (lambda adapter: (adapter / "adapter_config.json").unlink(), "no adapter is there"),
    "no tensors": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "it has no adapter_mod"),
    "an unknown task": (config(task_type="DREAM"), "'DREAM'"),
}
ANOTHER_BASE: Mapping[str, tuple[Change, str]] = {
    "name": (config(base_model_name_or_path="other/model"), "'other/model'"),
    "revision": (config(revision="v2"), "'v2'"),
    "task": (config(task_type="SEQ_CLS"), "task_type"),
    "size": (add(f"{Q}lora_A.weight", 4, 12), "q_proj is 16 x 16 in"),
    "head": (
        lambda adapter: (
            edit_config(adapter, modules_to_save=["lm_head"]),
            add("base_model.model.lm_head.weight", 50, 16)(adapter),
        ),
        "lm_head.weight (modules_to_save) is missing in",
    ),
}


@pytest.mark.parametrize(("change", "words"), [
    pytest.param(*case, id=what)
    for table in (NOT_PLAIN, DAMAGED, ANOTHER_BASE)
    for what, case in table.items()
])  # fmt: skip
def test_an_adapter_that_cannot_be_averaged_is_refused(
    change: Change, words: str, alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    good, bad = alike["llama"][0], tmp_path / "bad"
    shutil.copytree(alike["llama"][1], bad)
    change(bad)
    refused(aggregate("--strategy", "flora", "--out", tmp_path / "out", good, bad), words, str(bad))
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


OTHER_READING = {"max_length": 8, "assistant_loss": "last", "dpo_beta": 0.5}
"""Fields of a card that say how examples were read."""


@pytest.mark.parametrize(
    ("fields", "head", "words"),
    [
        (OTHER_READING, False, ""),
        (OTHER_READING | {"seed": 8}, True, ""),
        ({"seed": 8}, False, "seed in fedlora.json is 7"),
        ({"label_names": ("yes", "no")}, True, "label_names in fedlora.json"),
        ({"task": "multi-label-classification"}, True, "task in fedlora.json"),
        (
            {"model": ModelConfig(name="tiny", pooling="model")},
            True,
            "model.pooling in fedlora.json is 'mean'",
        ),
        ({"model": ModelConfig(name="tiny", dtype="bfloat16")}, True, "model.dtype in fedlora.json"),
        ({"model": ModelConfig(name="tiny", adapter="runs/a/adapter")}, True, ""),
    ],
)
def test_adapters_of_one_base_may_differ_in_how_examples_were_read(
    fields: dict[str, Any], head: bool, words: str, tmp_path: Path
) -> None:
    model = adapted("tiny", "mean", seed=7)
    state = state_of("plain", model)
    state = state if head else dataclasses.replace(state, head={})
    cards = card_of("tiny"), dataclasses.replace(card_of("tiny"), **fields)
    for name, card in zip("ab", cards, strict=True):
        export(tmp_path / name, state, {}, card)
    done = aggregate("--strategy", "flora", "--out", tmp_path / "out", tmp_path / "a", tmp_path / "b")
    if words:
        refused(done, "adapters of different base models", words)
    else:
        assert done.exit_code == 0, done.output
        assert AdapterCard.read(tmp_path / "out") == cards[0]


def test_a_truncated_file_is_refused_wherever_it_ends(
    alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    good, bad = alike["llama"][0], tmp_path / "bad"
    shutil.copytree(alike["llama"][1], bad)
    file = bad / "adapter_model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for end in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        result = aggregate("--strategy", "fedavg", "--out", tmp_path / "out", good, bad)
        refused(result, str(file), "not a whole safetensors file")
    file.write_bytes(whole + b"\0")
    refused(aggregate("--strategy", "fedavg", "--out", tmp_path / "out", good, bad), str(file))
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]
    file.write_bytes(whole)
    assert aggregate("--strategy", "fedavg", "--out", tmp_path / "out", good, bad).exit_code == 0


class Bomb:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


def test_a_pickle_is_refused_and_never_opened(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    bad, trace = tmp_path / "bad", tmp_path / "trace"
    shutil.copytree(alike["llama"][0], bad)
    (bad / "adapter_model.safetensors").unlink()
    (bad / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    result = aggregate("--strategy", "fedavg", "--out", tmp_path / "out", bad)
    refused(result, "adapter_model.bin", "a pickle can run any code", "safe_serialization")
    shutil.copy(bad / "adapter_model.bin", bad / "adapter_model.safetensors")
    refused(aggregate("--strategy", "fedavg", "--out", tmp_path / "out", bad), "not a whole safetensors file")
    assert not trace.exists()
    pickle.loads((bad / "adapter_model.bin").read_bytes())
    assert trace.exists(), "the bomb is real"


REQUESTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "too few weights": (("--weights=1",), "1 weights for 2 adapters"),
    "a negative weight": (("--weights=2,-1",), "-1 for"),
    "weights of sum zero": (("--weights=0,0",), "sum must be finite and > 0"),
    "weights that overflow": (("--weights=1e308,1e308",), "sum must be finite"),
    "a weight that is no number": (("--weights=nan,1",), "must be finite"),
    "weights in words": (("--weights=one,two",), "comma list of numbers"),
    "an unknown strategy": (("--strategy=fedavgg",), "did you mean fedavg?"),
    "an unknown option": (("--option=lam=1",), "lam"),
    "an option without a value": (("--option=lam",), "must be key=value"),
    "an option that nothing asks for": (("--option=init-a=orthonormal",), "the adapters bring their A"),
    "a base that is not there": (("--base=/nowhere",), "/nowhere: no such directory"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_bad_request_is_one_line(what: str, alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    arguments, words = REQUESTS[what]
    given = aggregate("--strategy", "fedavg", "--out", tmp_path / "out", *arguments, *alike["llama"][:2])
    refused(given, words)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_adapter_is_refused(
    bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    request = ["--strategy", "fedavg", "--out", tmp_path / "out", alike["llama"][0]]
    refused(aggregate(*request, bases["llama"]), str(bases["llama"]), "no adapter is there")
    refused(aggregate(*request, tmp_path / "none"), "none: no such directory")


def test_the_help_has_an_example() -> None:
    assert "fedlora aggregate --strategy" in aggregate("--help").stdout
