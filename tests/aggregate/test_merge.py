"""``--merge``: the model computes what base and adapter compute; what cannot be merged is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fedlora.config import ModelConfig
from fedlora.models import build_model
from fedlora.models.export import load_adapter as load_exported
from fedlora.models.export import save_adapter as export
from tests.aggregate.saved import (
    FAMILIES,
    aggregate,
    edit_config,
    loaded,
    logits,
    refused,
    save_adapter,
    save_base,
)
from tests.models.samples import adapted
from tests.models.test_export import card_of, state_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_the_merged_model_computes_base_and_adapter(
    name: str, family: str, bases: Mapping[str, Path], mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    request = ["--strategy", name, "--weights=3,1,4", *mixed[family]]
    assert aggregate(*request, "--out", tmp_path / "adapter").exit_code == 0
    assert aggregate(*request, "--out", tmp_path / "model", "--merge").exit_code == 0
    wanted = logits(loaded(family, bases[family], tmp_path / "adapter"))
    merged = FAMILIES[family].open(tmp_path / "model").eval()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(FAMILIES[family].open(bases[family]).eval()), wanted, atol=1e-3)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "model"}


def test_a_half_precision_base_keeps_its_dtype_and_says_what_rounding_lost(
    bases: Mapping[str, Path], mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    FAMILIES["llama"].open(bases["llama"]).bfloat16().save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    (base / "training.py").write_text("")
    request = ["--strategy", "flora", "--merge", "--base", base, *mixed["llama"]]
    result = aggregate(*request, "--out", tmp_path / "out")
    assert result.stdout.count("note: the base is bfloat16: rounding changed the update by") == 1
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "out"))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    target, other = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(before[target], after[target])
    assert torch.equal(before[other], after[other])
    copied = {p.name for p in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in copied
    assert "training.py" not in copied


def test_a_head_that_the_base_lacks_comes_from_the_adapters(
    bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    FAMILIES["bert"].open(bases["bert"]).bert.save_pretrained(tmp_path / "headless")
    request = ["--strategy", "fedavg", "--out", tmp_path / "out", "--merge", "--base", tmp_path / "headless"]
    assert aggregate(*request, *alike["bert"]).exit_code == 0
    aggregate("--strategy", "fedavg", "--out", tmp_path / "adapter", *alike["bert"])
    merged = FAMILIES["bert"].open(tmp_path / "out").eval()
    wanted = logits(loaded("bert", bases["bert"], tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)


def without_pooler(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, base / "model.safetensors", {"format": "pt"})


def cut(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickled(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


BAD_BASES: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "a parameter that nobody brings": (without_pooler, "bring bert.pooler.dense"),
    "a truncated file": (cut, "half a download look like this"),
    "pickles": (pickled, "no file named model.safetensors"),
    "nothing in it": (lambda base: (base / "config.json").unlink(), "not a transformers model"),
    "no JSON": (lambda base: (base / "config.json").write_text("{"), "not a valid JSON"),
    "its own code": (
        with_config(model_type="mine", auto_map={"AutoConfig": "m.C", "AutoModel": "m.M"}), "custom code",
    ),
    "files unlike its configuration": (with_config(hidden_size=32), "another shape in its files"),
    "another size": (with_config(hidden_size=32), "is 32 x 32, the adapters' is 16 x 16"),
    "another architecture": (with_config(model_type="roberta"), "has no layer bert.encoder"),
    "quantised weights": (with_config(quantization_config={"quant_method": "gptq"}), "quantised"),
    "fewer layers": (with_config(num_hidden_layers=1), "has no layer bert.encoder.layer.1"),
    "more layers than the adapters": (with_config(num_hidden_layers=3), "targets bert.encoder.layer.2"),
}  # fmt: skip
SEEN_WITHOUT_WEIGHTS = ("another size", "more layers than the adapters")
"""Asked without ``--merge``: that looks at the files first, and they do not match either."""


@pytest.mark.parametrize("what", BAD_BASES)
def test_a_base_that_does_not_fit_is_refused(
    what: str, bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    change, words = BAD_BASES[what]
    shutil.copytree(bases["bert"], tmp_path / "base")
    change(tmp_path / "base")
    merge = [] if what in SEEN_WITHOUT_WEIGHTS else ["--merge"]
    request = ["--strategy", "flora", "--out", tmp_path / "out", "--base", tmp_path / "base", *merge]
    refused(aggregate(*request, *alike["bert"]), words)
    assert {p.name for p in tmp_path.iterdir()} == {"base"}


def test_a_head_of_other_labels_is_refused(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    base = save_base("bert", tmp_path / "base", num_labels=5, id2label=None, label2id=None)
    request = ["--strategy", "flora", "--out", tmp_path / "out", "--merge", "--base", base, *alike["bert"]]
    refused(aggregate(*request), "classifier", "(5", "(3", "as many labels")


def test_a_weight_that_two_layers_share_is_refused(bases: Mapping[str, Path], tmp_path: Path) -> None:
    head = save_adapter(tmp_path / "a", "gpt2", bases["gpt2"], 1, modules_to_save=["lm_head"])
    request = ["--strategy", "flora", "--out", tmp_path / "out", "--merge", head, head]
    refused(aggregate(*request), "lm_head.weight is tied to transformer.wte.weight")
    assert not (tmp_path / "out").exists()


def test_a_head_that_an_adapter_names_and_does_not_bring_is_refused(
    bases: Mapping[str, Path], tmp_path: Path
) -> None:
    saved = save_adapter(tmp_path / "a", "llama", bases["llama"], 1, modules_to_save=["lm_head"])
    edit_config(saved, modules_to_save=["lm_head", "model.norm", "elsewhere"])
    request = ["--strategy", "flora", "--out", tmp_path / "out", "--base", bases["llama"], saved]
    refused(aggregate(*request), f"{saved}: its modules_to_save names model.norm, but it holds no tensor")
    edit_config(saved, modules_to_save=["lm_head", "elsewhere"])
    assert aggregate(*request).exit_code == 0


def test_merging_needs_a_base_that_is_here(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    shutil.copytree(alike["llama"][0], tmp_path / "a")
    edit_config(tmp_path / "a", base_model_name_or_path="someone/llama")
    request = ["--strategy", "flora", "--out", tmp_path / "out", "--merge", tmp_path / "a"]
    refused(aggregate(*request), "--merge", "someone/llama", "give --base")


def test_an_adapter_of_fedlora_is_merged_where_its_base_is_a_model_of_transformers(tmp_path: Path) -> None:
    for pooling in ("mean", "model"):
        model = adapted("tiny", pooling, seed=7)
        export(tmp_path / pooling, state_of("plain", model), {}, card_of("tiny", pooling))
    build_model(ModelConfig(name="tiny", pooling="model"), 2, 7).save_pretrained(tmp_path / "base")
    request = ["--strategy", "flora", "--merge", "--base", tmp_path / "base", "--out", tmp_path / "out"]
    refused(aggregate(*request, tmp_path / "mean"), "mean-pooled classifier is no model of transformers")
    assert aggregate(*request, tmp_path / "model").exit_code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    wanted = logits(load_exported(tmp_path / "model")[0])
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
