"""What a run ended with: the digest of its adapter, and the logits that the test examples get from it."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from experiments.benchmarks.engine_cells import HOME
from fedlora.config import ModelConfig, RunConfig, read_config
from fedlora.core.parallel import one_thread
from fedlora.core.peft_keys import from_peft
from fedlora.data.examples import collate
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.prepared.cache import open_prepared


def probe(regime: str, out: Path) -> dict[str, Any]:
    """``adapter`` (sha256 of names and values) and ``logits`` (examples x labels)."""
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].float().numpy().tobytes())
    config, parts = read_config(HOME / regime / "config.toml"), from_peft(tensors)
    model = _model(config.model)
    model.load(parts.adapters(config.lora.scaling(config.lora.rank)), parts.head)
    setting = tomllib.loads((HOME / regime / "setting.toml").read_text())
    data = open_prepared(setting["data"])
    batch = collate(data.test, np.arange(len(data.test)), data.pad_token_id)
    with one_thread(), torch.no_grad():
        logits = model.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return {"adapter": digest.hexdigest(), "logits": logits.tolist()}


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest difference between two tables of logits."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


@lru_cache(maxsize=1)
def _model(config: ModelConfig) -> AdaptedModel:
    network = build_model(config, 2, RunConfig().seed)
    return AdaptedModel(network, resolve_targets(network, ""))
