"""What all ways of a regime are given: text, prepared data, configuration and the initial adapter.

    python -m experiments.benchmarks.engine_data CELLS.json DEVICE

It runs before anything is timed: tokenising once is no part of a run's cost for any way.
"""

from __future__ import annotations

import json
import sys
from itertools import cycle, islice
from pathlib import Path

import tomli_w
from safetensors.torch import save_file

from experiments.benchmarks.engine_cells import HOME, Regime
from fedlora.assets.fetch import asset_path
from fedlora.config import FlatConfig, from_flat, unflatten
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.peft_keys import to_peft
from fedlora.core.seeding import stream
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.prepared.cache import open_prepared, prepare

MAX_LENGTH = {"fixed": 32, "real": 64}
WORDS = 40
"""So many words are more than 32 tokens."""
TEST_EXAMPLES = 64
PARTITION_SIZE = 32
NOISE, CLIP, DELTA = 1.0, 1.0, 1e-5
AMPLE_EPSILON = 1000.0
"""No client declines: what is measured is the work, at a given noise."""


def main() -> None:
    """Files for every regime: ``config.toml`` for fedlora, ``setting.toml`` for the others."""
    regimes = [Regime(**fields) for fields in json.loads(sys.argv[1])]
    for regime in regimes:
        write_setting(regime, sys.argv[2])


def write_setting(regime: Regime, device: str) -> None:
    """A regime's folder under `HOME`."""
    folder = HOME / regime.name
    folder.mkdir(parents=True, exist_ok=True)
    flat = configuration(regime, write_texts(regime), device)
    (folder / "config.toml").write_text(tomli_w.dumps(unflatten(flat)))
    config = from_flat(flat)
    prepared = prepare(config)
    network = build_model(config.model, open_prepared(prepared).num_labels, config.seed)
    model = AdaptedModel(network, resolve_targets(network, ""))
    adapters = fresh_adapters(model.modules, config.lora.rank, config.lora.scaling(config.lora.rank), 0)
    save_file(to_peft(adapters, model.initial_head), folder / "initial.safetensors")
    setting = {
        "model": str(asset_path("minilm")),
        "data": str(prepared.resolve()),
        "initial": str((folder / "initial.safetensors").resolve()),
        "population": regime.population,
        "sampled": regime.sampled,
        "batch-size": regime.batch_size,
        "local-steps": regime.local_steps,
        "learning-rate": config.train.learning_rate,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "private": regime.private,
        "noise-multiplier": NOISE,
        "max-grad-norm": CLIP,
        "delta": DELTA,
        "seed": config.seed,
    }
    (folder / "setting.toml").write_text(tomli_w.dumps(setting))


def configuration(regime: Regime, texts: Path, device: str) -> FlatConfig:
    """What ``fedlora run`` is asked for; rounds, evaluation and engine are set on the command line."""
    flat: FlatConfig = {
        "seed": 0,
        "fraction-train": regime.sampled / regime.population,
        "min-train-nodes": regime.sampled,
        "model.name": "minilm",
        "model.pooling": "model",
        "data.name": str((texts / "train.jsonl").resolve()),
        "data.test": str((texts / "test.jsonl").resolve()),
        "data.max-length": MAX_LENGTH[regime.text],
        "data.evaluate-examples": 0,
        "data.partitioner": "iid" if regime.private else "bootstrap",
        "data.num-partitions": regime.population,
        "data.partition-size": PARTITION_SIZE,
        "train.local-steps": regime.local_steps,
        "train.batch-size": regime.batch_size,
        "engine.device": device,
    }
    if regime.private:
        flat |= {
            "privacy.mode": "example",
            "privacy.noise-multiplier": NOISE,
            "privacy.max-grad-norm": CLIP,
            "privacy.target-delta": DELTA,
            "privacy.target-epsilon": AMPLE_EPSILON,
        }
    return flat


def write_texts(regime: Regime) -> Path:
    """The folder with ``train.jsonl`` and ``test.jsonl``: the sentiment sentences, shuffled.

    For ``fixed`` the words of each sentence are repeated until no example is shorter than 32 tokens. Clients
    draw from the same examples; private ones may share none, so that there are then just enough, the
    sentences over again where need be.
    """
    number = regime.population * PARTITION_SIZE if regime.private else 0
    folder = HOME / "texts" / (f"{regime.text}-{number}" if number else regime.text)
    if (folder / "train.jsonl").is_file():
        return folder
    from fedlora.data.builtin.sentiment import sentiment_table

    folder.mkdir(parents=True, exist_ok=True)
    table = sentiment_table()
    rows = [{"text": t, "label": label} for t, label in zip(table["text"], table["label"], strict=True)]
    order = stream(0, "benchmark-texts").permutation(len(rows))
    lines = [json.dumps(rows[i] if regime.text == "real" else _long(rows[i])) + "\n" for i in order]
    train = lines[TEST_EXAMPLES:]
    (folder / "test.jsonl").write_text("".join(lines[:TEST_EXAMPLES]))
    (folder / "train.jsonl").write_text("".join(islice(cycle(train), number or len(train))))
    return folder


def _long(row: dict[str, str]) -> dict[str, str]:
    words = row["text"].split()
    return {**row, "text": " ".join(islice(cycle(words), max(WORDS, len(words))))}


if __name__ == "__main__":
    main()
