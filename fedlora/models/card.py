"""Recipe of the base that an adapter belongs to, and by which name PEFT and transformers find that base."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fedlora.assets.models import HUB_IDS, RANDOM_MODELS, model_directory
from fedlora.config import ModelConfig
from fedlora.core.files import user_path
from fedlora.core.sealed import FILES_SHA256, SEAL, changed, hashes, read_sealed, sealed
from fedlora.data.image_reader import PRETRAINED, TINY, model_source
from fedlora.errors import ConfigError
from fedlora.tasks import CLASSIFICATION, task_named

CARD_FILE = "fedlora.json"
VOUCHED = ("adapter_config.json", "adapter_model.safetensors")
LIBRARY = "transformers."
"""Modules of classes that PEFT's AutoPeftModel may import."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """Recipe of the base that an adapter belongs to; kept as ``fedlora.json``.

    Attributes:
        model: which base.
        label_names: the classes, in the order of the logits.
        max_length: longest sequence in tokens.
        seed: the seed of `build_model`, for weights that neither checkpoint nor adapter bring.
        task: what it was trained for.
        assistant_loss: of conversations, which answers it was trained on.
        dpo_beta: of pairs, by which its loss and margin are measured.
    """

    model: ModelConfig
    label_names: tuple[str, ...]
    max_length: int
    seed: int
    task: str = CLASSIFICATION.name
    assistant_loss: Literal["all", "last"] = "all"
    dpo_beta: float = 0.1

    def write(self, directory: Path) -> None:
        """Write ``fedlora.json``, which vouches for itself and for the adapter's files that are there."""
        files = [file for file in VOUCHED if (directory / file).is_file()]
        record = sealed(asdict(self) | {FILES_SHA256: hashes(directory, files)})
        (directory / CARD_FILE).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> AdapterCard:
        """The card of a directory from `save_adapter`.

        Raises:
            ConfigError: no such file, not what `save_adapter` writes, or a file that it vouches for changed.
        """
        path = directory / CARD_FILE
        if not path.is_file():
            inside = directory / "adapter"
            hint = f"; the run's adapter is in {inside}" if (inside / CARD_FILE).is_file() else ""
            raise ConfigError(f"{path}: is missing, so this is not an adapter that fedlora wrote{hint}")
        fields = read_sealed(path, older=True)
        if other := changed(directory, fields):
            raise ConfigError(
                f"{other}: is not what was written; put it back, or delete {SEAL} and {FILES_SHA256} from "
                f"{CARD_FILE} if it was changed on purpose"
            )
        try:
            return cls(
                model=ModelConfig(**fields["model"]),
                label_names=tuple(fields["label_names"]),
                max_length=fields["max_length"],
                seed=fields["seed"],
                task=fields.get("task", CLASSIFICATION.name),
                assistant_loss=fields.get("assistant_loss", "all"),
                dpo_beta=fields.get("dpo_beta", 0.1),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not an adapter that fedlora wrote ({error!r})") from None

    @property
    def mean_pooled(self) -> bool:
        """Whether the network is fedlora's own classifier, which no Auto class builds."""
        return task_named(self.task).network == "classifier" and self.model.pooling == "mean"

    @property
    def base_name(self) -> str | None:
        """Name of the base for anybody, anywhere: a hub id, or the absolute path of a directory.

        None where the base has no files, or only those that fedlora made in its cache.
        """
        name = self.model.name
        if name in (*RANDOM_MODELS, *PRETRAINED, *TINY):
            return None
        return HUB_IDS.get(name) or absolute(name)

    def base_source(self) -> str | None:
        """Place of the base for transformers on this machine: a directory or a hub id; None if it is random.

        Raises:
            AssetError: a built-in model could not be fetched.
        """
        name = self.model.name
        if name in (*RANDOM_MODELS, *TINY):
            return None
        if name in PRETRAINED:
            return model_source(name)
        return str(model_directory(name) or absolute(name))

    def auto_fields(self, network: type[nn.Module] | None) -> dict[str, Any]:
        """PEFT's fields by which its Auto classes open the base.

        Args:
            network: the class of the base; image models, for which PEFT has no task type, are found by it.
        """
        kind, fields = task_named(self.task).network, {"base_model_name_or_path": self.base_name}
        if kind == "language-model":
            return {"task_type": "CAUSAL_LM", **fields}
        if kind == "classifier" and not self.mean_pooled:
            return {"task_type": "SEQ_CLS", **fields}
        if kind == "image-classifier" and network is not None and network.__module__.startswith(LIBRARY):
            auto = {"base_model_class": network.__name__, "parent_library": network.__module__}
            return {"auto_mapping": auto, **fields}
        return fields


def absolute(name: str | None) -> str | None:
    """A base's name as it can be used from anywhere: the path of a directory that is here, or as it is.

    >>> absolute("someone/model"), absolute(None)
    ('someone/model', None)
    """
    if not name:
        return name
    path = user_path(name)
    return str(path.resolve()) if path.is_dir() else name.rstrip("/")
