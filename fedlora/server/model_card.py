"""Files beside an adapter: its model card, and the tokenizer or preprocessor that belongs to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fedlora.assets.models import ROUNDED
from fedlora.config import RunConfig
from fedlora.data.chat.template import chat_settings
from fedlora.data.tokenizers import PretrainedTokenizer, load_tokenizer
from fedlora.models import AdapterCard
from fedlora.tasks import task_named

MODEL_CARD = "README.md"
PREPROCESSOR = "preprocessor_config.json"
PIPELINES = {
    "classifier": "text-classification",
    "language-model": "text-generation",
    "image-classifier": "image-classification",
}
"""The hub's name for what each network does."""


def write_beside(directory: Path, config: RunConfig, card: AdapterCard, *, reader: bool = True) -> None:
    """Write the model card and, for a ``reader``, what turns texts or pictures into the model's inputs."""
    (directory / MODEL_CARD).write_text(model_card(config, card))
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


def model_card(config: RunConfig, card: AdapterCard) -> str:
    """Markdown with the hub's front matter: what the adapter is, how it came about, how it is opened."""
    network = task_named(card.task).network
    front = ["library_name: peft", f"pipeline_tag: {PIPELINES[network]}", "tags: [lora, federated]"]
    if card.base_name is not None:
        front.insert(0, f"base_model: {json.dumps(card.base_name)}")
    base = card.base_name or f"{card.model.name} (made by fedlora, on no hub)"
    lines = [
        "---", *front, "---", "",
        f"# {card.task}, {config.strategy.name}",
        "",
        f"An adapter over `{base}`, trained by federated fine-tuning with fedlora: strategy "
        f"`{config.strategy.name}`, {config.num_server_rounds} rounds, data `{_data(config)}`.",
        "",
        _privacy(config),
    ]  # fmt: skip
    if card.label_names:
        lines += ["", f"Labels, in the order of the logits: {', '.join(map(repr, card.label_names))}."]
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
        f"Trained under {privacy.granularity}-level differential privacy; what was spent stands in the run's "
        "`rounds.jsonl`."
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
            f'model = AutoPeftModelForSequenceClassification.from_pretrained("ADAPTER", num_labels={labels})',
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
