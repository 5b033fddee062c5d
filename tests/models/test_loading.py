"""Weights that transformers cannot use are refused in one line by every command that reads a base."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig

from fedlora.assets.loading import pretrained
from fedlora.config import ModelConfig
from fedlora.errors import ConfigError
from fedlora.evaluation.adapter import evaluate_adapter
from fedlora.merge.group import gather
from fedlora.merge.merged_model import open_base
from fedlora.models import AdaptedModel, AdapterCard, build_model, resolve_targets
from fedlora.models.export import save_adapter
from fedlora.models.peft_files import read_adapter
from fedlora.models.vision.backbones import image_classifier
from tests.models.families import LABELS
from tests.models.test_export import state_of

Save = Callable[..., Path]
WEIGHTS = "model.safetensors"


def edit(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})


class Evil:
    """Runs code where a pickle is read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a pickle ran')",)


def pickled(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"bert.x": Evil()}))


def sharded(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    where = dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
    (model / WEIGHTS).unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def without_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layer.0." in name]:
        del tensors[name]


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bert.encoder.layer.0.output.dense.weight"][0, 0] = float("nan")


def remote(model: Path) -> None:
    edit(
        model, model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForSequenceClassification": "m.M"}
    )
    (model / "c.py").write_text("raise SystemExit('remote code ran')\n")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (lambda m: (m / WEIGHTS).write_text(POINTER), "Git LFS pointer"),
    "half": (lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:3000]), "half a download"),
    "empty": (lambda m: (m / WEIGHTS).write_bytes(b""), "half a download"),
    "none": (lambda m: (m / WEIGHTS).unlink(), WEIGHTS),
    "wider": (lambda m: edit(m, intermediate_size=32), "by its config.json"),
    "shard": (sharded, "00002-of-00002"),
    "pickle": (pickled, ""),
    "other": (lambda m: rewrite(m, without_layer), "lack"),
    "nan": (lambda m: rewrite(m, not_finite), "holds NaN or infinity"),
    "json": (lambda m: (m / "config.json").write_text('{"model_type": "bert"'), ""),
    "nonsense": (lambda m: edit(m, num_attention_heads="two"), ""),
    "unknown": (lambda m: edit(m, model_type="nobodys"), "nobodys"),
    "remote": (remote, ""),
}


@pytest.fixture
def bert(saved: Save, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved("bert"), tmp_path / "bert"))


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_run(kind: str, pooling: str, bert: Path) -> None:
    spoil, wanted = BROKEN[kind]
    spoil(bert)
    message = refused(lambda: build_model(ModelConfig(name=str(bert), pooling=pooling), LABELS, 0))
    assert message.startswith(f"model.name = {str(bert)!r}: ")
    assert wanted in message


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", ["pointer", "other", "nan", "json", "remote"])
def test_an_evaluation_and_a_merge(kind: str, bert: Path, tmp_path: Path) -> None:
    config = ModelConfig(name=str(bert), pooling="model")
    module = build_model(config, LABELS, 0)
    model = AdaptedModel(module, resolve_targets(module, ""))
    card = AdapterCard(model=config, label_names=("a", "b", "c"), max_length=16, seed=0)
    save_adapter(tmp_path / "adapter", state_of("plain", model), {}, card)
    (tmp_path / "d.jsonl").write_text('{"text": "w1 w2", "label": "a"}\n{"text": "w3", "label": "b"}\n' * 2)
    BROKEN[kind][0](bert)
    data = str(tmp_path / "d.jsonl")
    evaluating = refused(
        lambda: evaluate_adapter(tmp_path / "adapter", data, text_column="text", label_column="label")
    )
    assert evaluating.startswith(f"model.name = {str(bert)!r}: ")
    group = gather([read_adapter(tmp_path / "adapter")], bert)
    if kind != "other":  # what the base lacks an adapter may bring; `write_merged` asks for the rest
        message = refused(lambda: open_base(bert, group, weights=True))
        assert message.startswith(f"--base {bert}: ")


def test_a_head_for_another_number_of_labels(bert: Path) -> None:
    message = refused(lambda: build_model(ModelConfig(name=str(bert), pooling="model"), 5, 0))
    assert "its own head has another number of labels than the data" in message
    assert "(3,), 5 labels want (5,)" in message
    network: Any = build_model(ModelConfig(name=str(bert), pooling="mean"), 5, 0)  # the way out
    assert network.classifier.out_features == 5


def test_a_language_model_without_its_output_embedding(saved: Save) -> None:
    model = saved("llama")  # a classifier
    message = refused(lambda: build_model(ModelConfig(name=str(model)), 0, 0, "language-model"))
    assert "lack 1 of the model's tensors, lm_head.weight" in message


def test_a_head_and_a_pooler_may_be_drawn(saved: Save, bert: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "pooler" in name or name.startswith("classifier")]:
            del tensors[name]

    rewrite(bert, drop)
    for pooling in ("model", "mean"):
        build_model(ModelConfig(name=str(bert), pooling=pooling), LABELS, 0)


def test_an_image_model_takes_a_new_head_and_no_other_new_weights(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(image_size=28, patch_size=14, num_channels=1, num_labels=4, **sizes)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    image_classifier(str(tmp_path), 7, 0)
    edit(tmp_path, intermediate_size=24)
    assert "by its config.json" in refused(lambda: image_classifier(str(tmp_path), 7, 0))
    (tmp_path / WEIGHTS).write_text(POINTER)
    assert "Git LFS pointer" in refused(lambda: image_classifier(str(tmp_path), 7, 0))


def test_an_error_that_nobody_foresaw_is_one_line_too(bert: Path) -> None:
    class Odd:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise AttributeError("two\nlines")

    assert AutoConfig.from_pretrained(bert)
    message = refused(lambda: pretrained(Odd, bert, "model.name = 'x'", "accepted are"))
    assert message == "model.name = 'x': it cannot be loaded (AttributeError: two)"
