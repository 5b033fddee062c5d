"""Files beside an adapter: its model card, and the tokenizer or preprocessor that belongs to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from clients.runtime import ClientRuntime
from fedlora.assets.models import ROUNDED
from fedlora.config import RunConfig
from fedlora.data.chat.template import chat_settings
from fedlora.data.targets import REGRESSION
from fedlora.data.tokenizers import PretrainedTokenizer, load_tokenizer
from fedlora.models import AdapterCard
from fedlora.server.best import Records, best_round
from fedlora.server.inputs import base_parts, data_parts, digest_of
from fedlora.tasks import task_named

MODEL_CARD = "README.md"
PREPROCESSOR = "preprocessor_config.json"
PIPELINES = {
    "classifier": "text-classification",
    "language-model": "text-generation",
    "image-classifier": "image-classification",
}
"""The hub's name for what each network does."""


def write_beside(
    directory: Path,
    config: RunConfig,
    card: AdapterCard,
    *,
    reader: bool = True,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the model card and, for a ``reader``, what turns texts or pictures into the model's inputs."""
    (directory / MODEL_CARD).write_text(model_card(config, card, about or {}))
    if not reader:
        return
    if task_named(card.task).network == "image-classifier":
        source = Path(card.base_source() or "") / PREPROCESSOR
        if source.is_file():
            shutil.copyfile(source, directory / PREPROCESSOR)
        return
    tokenizer = load_tokenizer(config.model.name, chat_settings(config))
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.save(directory)


def about_run(config: RunConfig, runtime: ClientRuntime, records: Records, *, here: bool) -> dict[str, str]:
    """Facts of a run for the model card.

    Args:
        config: the run.
        runtime: its model and data.
        records: the lines of ``rounds.jsonl``.
        here: the data is here, and not at nodes.
    """
    clients = {partition for record in records for partition in record["participants"]}
    claims = [record["claim"] for record in records if "claim" in record]
    found = {"rounds": str(len(records)), "clients": str(len(clients))}
    if config.load_best_model_at_end:
        found["best round"] = f"{best_round(config, records)}, whose model this is"
    if claims:
        largest = max(claims, key=lambda claim: float(claim["epsilon"]))
        found["epsilon"] = f"{largest['epsilon']:.4g} at delta {largest['delta']:g}, the most of any client"
    found["base, hash"] = digest_of(base_parts(runtime))
    if here:
        found["data, hash"] = digest_of(data_parts(runtime.data))
    return found


def model_card(config: RunConfig, card: AdapterCard, about: Mapping[str, str]) -> str:
    """Markdown with the hub's front matter: what the adapter is, how it came about, how it is opened."""
    network = task_named(card.task).network
    front = ["library_name: peft", f"pipeline_tag: {PIPELINES[network]}", "tags: [lora, federated]"]
    if card.base_name is not None:
        front.insert(0, f"base_model: {json.dumps(card.base_name)}")
    if config.license:
        front.insert(0, f"license: {config.license}")
    base = card.base_name or f"{card.model.name} (made by fedlora, on no hub)"
    lines = [
        "---", *front, "---", "",
        f"# {card.task}, {config.strategy.name}",
        "",
        f"An adapter over `{base}`, trained by federated fine-tuning with fedlora: strategy "
        f"`{config.strategy.name}`, data `{_data(config)}`.",
        "",
        _privacy(config),
    ]  # fmt: skip
    if about:
        lines += ["", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in about.items())]
    if card.label_names:
        what = "Targets" if task_named(card.task).problem_type == REGRESSION else "Labels"
        lines += ["", f"{what}, in the order of the logits: {', '.join(map(repr, card.label_names))}."]
    if card.model.name in ROUNDED or card.model.quantization != "none":
        lines += [
            "",
            "It was trained over weights of the base that are rounded to 4 bits; over the base's own weights "
            "results differ a little. `fedlora.load` opens it over the very weights.",
        ]
    return "\n".join([*lines, "", "## How it is opened", "", "```python", *_opening(card), "```", ""])


def _data(config: RunConfig) -> str:
    """The data by name: a path says what machine it was on."""
    name = config.data.name
    return Path(name).name if Path(name).expanduser().exists() else name


def _privacy(config: RunConfig) -> str:
    privacy = config.privacy
    if privacy.mode == "none":
        return "Trained without differential privacy: examples may be read out of it."
    return (
        f"Trained under {privacy.granularity}-level differential privacy; what each client spent stands "
        "in the run's `rounds.jsonl`."
    )


def _opening(card: AdapterCard) -> list[str]:
    """Python by which it is opened; the adapter's directory is ``ADAPTER``."""
    task, labels = task_named(card.task), len(card.label_names)
    ours = ["import fedlora", "", 'model = fedlora.load("ADAPTER")']
    if card.base_name is None or card.mean_pooled:
        return [*ours, f"print(model.{'predict' if task.labelled else 'generate'}({_input(card)}))"]
    if task.network == "language-model":
        return [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("ADAPTER")',
            'tokenizer = AutoTokenizer.from_pretrained("ADAPTER")',
        ]
    if task.network == "classifier":
        return [
            "from peft import AutoPeftModelForSequenceClassification",
            "from transformers import AutoTokenizer",
            "",
            "model = AutoPeftModelForSequenceClassification.from_pretrained(",
            f'    "ADAPTER", num_labels={labels}, problem_type="{task.problem_type}"',
            ")",
            'tokenizer = AutoTokenizer.from_pretrained("ADAPTER")',
            "model.config.pad_token_id = tokenizer.pad_token_id",
        ]
    return [
        "from peft import AutoPeftModel",
        "",
        "model = AutoPeftModel.from_pretrained(",
        f'    "ADAPTER", num_labels={labels}, ignore_mismatched_sizes=True',
        ")",
    ]


def _input(card: AdapterCard) -> str:
    task = task_named(card.task)
    if not task.labelled:
        return '"a text"'
    return '["picture.png"]' if task.network == "image-classifier" else '["a text"]'
