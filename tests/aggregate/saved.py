"""Adapters as PEFT saves them, over tiny random bases; PEFT itself says what their products are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from typer.testing import CliRunner, Result

from fedlora.cli import cli
from tests.oracles import Array

TINY = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Family:
    """One architecture: its class, its configuration, and the layers that its adapters may target."""

    model_class: Any
    config: Any
    task_type: str
    targets: tuple[str, ...]
    conv1d: bool = False

    def open(self, base: Path) -> Any:
        return self.model_class.from_pretrained(base, dtype=torch.float32)


FAMILIES = {
    "llama": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**TINY, hidden_size=16, intermediate_size=28),
        "CAUSAL_LM",
        ("q_proj", "v_proj", "down_proj"),
    ),
    "gpt2": Family(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        "CAUSAL_LM",
        ("c_attn", "attn.c_proj", "mlp.c_fc"),
        conv1d=True,
    ),
    "bert": Family(
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**TINY, hidden_size=16, intermediate_size=28, num_labels=3),
        "SEQ_CLS",
        ("query", "value", "output.dense"),
    ),
}


def save_base(family: str, directory: Path, **config: Any) -> Path:
    """A random model of the family."""
    kind = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = type(kind.config)(**{**kind.config.to_dict(), **config})
        kind.model_class(made).save_pretrained(directory)
    return directory


def save_adapter(
    directory: Path, family: str, base: Path, seed: int, shared_a: int | None = None, **config: Any
) -> Path:
    """A trained-looking adapter: factors and head random, A of the seed ``shared_a`` where it is given."""
    kind = FAMILIES[family]
    settings = {"target_modules": list(kind.targets[:2]), "task_type": kind.task_type, **config}
    model = wrapped(kind.open(base), LoraConfig(fan_in_fan_out=kind.conv1d, **settings))
    own = torch.Generator().manual_seed(seed)
    common = own if shared_a is None else torch.Generator().manual_seed(shared_a)
    for name, tensor in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            stream = common if "lora_A" in name else own
            tensor.data.copy_(torch.randn(tensor.shape, generator=stream) * 0.3)
    model.save_pretrained(directory)
    return directory


def wrapped(model: Any, config: LoraConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def loaded(family: str, base: Path, adapter: Path) -> Any:
    """The base with an adapter, by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(FAMILIES[family].open(base), adapter).eval()


def deltas(model: Any) -> dict[str, Array]:
    """PEFT's own change of each adapted layer's weight, as the layer stores it, in float64."""
    return {
        name: layer.get_delta_weight("default").detach().double().numpy()
        for name, layer in model.double().named_modules()
        if isinstance(layer, LoraLayer)
    }


def mean_delta(family: str, base: Path, adapters: Sequence[Path], p: Sequence[float]) -> dict[str, Array]:
    """``sum_k p_k dW_k``, dense; an adapter without a layer changes it by zero."""
    total: dict[str, Array] = {}
    for path, weight in zip(adapters, p, strict=True):
        for name, delta in deltas(loaded(family, base, path)).items():
            total[name] = total.get(name, np.zeros_like(delta)) + weight * delta
    return total


def assert_close(given: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = 2e-6) -> None:
    assert given.keys() == expected.keys()
    for name, wanted in expected.items():
        assert np.linalg.norm(given[name] - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-3), name


def logits(model: Any) -> Tensor:
    ids = torch.arange(1, 25).reshape(3, 8)
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out


def edit_config(adapter: Path, **fields: Any) -> None:
    """Change fields of ``adapter_config.json``."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def aggregate(*arguments: str | Path) -> Result:
    """``fedlora aggregate`` in this process."""
    return CliRunner().invoke(cli, ["aggregate", *map(str, arguments)])


def refused(result: Result, *words: str) -> None:
    """One line on standard error that holds the words, exit code 2."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
