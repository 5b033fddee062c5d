"""``adapter_config.json``: what it says of a plain LoRA adapter, and why anything else is refused.

Plain means ``W = W_0 + s B A`` on linear layers, with the pristine ``W_0``: then the adapters of several
clients can be read as factors, and what is written can be read as one adapter again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from fedlora.errors import ConfigError
from fedlora.models.peft_names import plain_fields

CONFIG_FILE = "adapter_config.json"
IDENTITY = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
"""Fields that say which base an adapter belongs to; PEFT takes them as they are."""
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base weight as it was."""
EXTENSIONS = (
    *(field.name for field in dataclasses.fields(PeftLoraConfig) if field.metadata.get("is_lora_variant")),
    "lora_bias", "use_qalora", "target_parameters", "layer_replication", "trainable_token_indices",
    "megatron_config", "ensure_weight_tying",
)  # fmt: skip
"""Fields that, where they are set, make an adapter more than LoRA on linear layers."""
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
"""Fields by which PEFT chooses the modules that it adapts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLora:
    """Contents of an ``adapter_config.json``.

    Attributes:
        rank, alpha: for modules that no pattern names.
        rslora: the scaling is alpha / sqrt(r) instead of alpha / r.
        rank_pattern, alpha_pattern: module names, or regular expressions for their ends, to values.
        fan_in_fan_out: the adapted layers are Conv1D, in PEFT's term.
        modules_to_save: the modules that are trained whole.
        identity: the base, field by field of ``IDENTITY``.
        selection: PEFT's own configuration, of the fields that choose modules alone.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    identity: Mapping[str, Any]
    selection: PeftLoraConfig

    @classmethod
    def read(cls, directory: Path, wrappers: Iterable[str] = ()) -> PlainLora:
        """The configuration of an adapter directory, without wrappers in its names.

        Args:
            directory: the adapter's.
            wrappers: those that the names of its tensors had.

        Raises:
            ConfigError: no such file, no JSON object, a value of a wrong kind, or not plain LoRA.
        """
        path = directory / CONFIG_FILE
        try:
            fields = json.loads(path.read_bytes())
        except OSError:
            inside = sorted(f.parent.name for f in directory.glob(f"*/{CONFIG_FILE}"))
            hint = f"; name one of its own: {', '.join(inside)}" if inside else ""
            raise ConfigError(f"{directory}: no adapter is there (it has no {CONFIG_FILE}{hint})") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: not a JSON object")
        _refuse_other_methods(path, fields)
        try:
            return cls._of(plain_fields(fields, wrappers))
        except (KeyError, TypeError, ValueError, OverflowError, re.error) as error:
            raise ConfigError(f"{path}: not what PEFT writes ({_reason(error)})") from None

    @classmethod
    def _of(cls, fields: Mapping[str, Any]) -> PlainLora:
        identity = {key: fields.get(key) for key in IDENTITY}
        for key, value in identity.items():
            if not isinstance(value, dict if key == "auto_mapping" else str) and value is not None:
                raise ValueError(f"{key} = {value!r}")
        if identity["task_type"] is not None:
            TaskType(identity["task_type"])
        selection = PeftLoraConfig(**{key: fields.get(key) for key in SELECTION})
        check_target_module_exists(selection, "a.0.b")  # PEFT checks the kinds of values where it uses them
        return cls(
            rank=_number(fields, "r", int),
            alpha=_number(fields, "lora_alpha", float),
            rslora=bool(fields.get("use_rslora")),
            rank_pattern=_patterns(fields, "rank_pattern", int),
            alpha_pattern=_patterns(fields, "alpha_pattern", float),
            fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
            modules_to_save=tuple(map(str, fields.get("modules_to_save") or ())),
            identity=identity,
            selection=selection,
        )

    def rank_of(self, module: str) -> int:
        """The rank that the module should have."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), module), self.rank)

    def scaling(self, module: str, rank: int) -> float:
        """Alpha / r, or alpha / sqrt(r) with rsLoRA.

        Raises:
            ConfigError: an alpha of 0, or one that is no finite number.
        """
        key = get_pattern_key(self.alpha_pattern.keys(), module)
        alpha = self.alpha_pattern.get(key, self.alpha)
        if alpha == 0 or not math.isfinite(alpha):
            raise ConfigError(f"{module}: alpha = {alpha} must be a finite number other than 0")
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT puts an adapter into a linear layer of that name."""
        return bool(check_target_module_exists(self.selection, module))

    def saver(self, tensor: str) -> str | None:
        """The module of ``modules_to_save`` that a tensor belongs to, as PEFT finds it: by the name's end."""
        parts = tensor.split(".")
        owners = [".".join(parts[:end]) for end in range(1, len(parts))]
        return next((m for m in self.modules_to_save if any(o.endswith(m) for o in owners)), None)


def _refuse_other_methods(path: Path, fields: Mapping[str, Any]) -> None:
    kind, bias, init = (fields.get(key) for key in ("peft_type", "bias", "init_lora_weights"))
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type = {kind!r}: only LORA can be aggregated or started from")
    if bias not in (None, "none"):
        raise ConfigError(f"{path}: bias = {bias!r}: trained biases are no LoRA factors, accepted is 'none'")
    if init not in KEEPS_BASE:
        raise ConfigError(
            f"{path}: init_lora_weights = {init!r} moves the base weights, so the factors alone are not the "
            "update (convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    known = {field.name for field in dataclasses.fields(PeftLoraConfig)}
    for key, value in fields.items():
        if value and (key in EXTENSIONS or key not in known):
            why = (
                "only plain LoRA"
                if key in known
                else f"PEFT {peft.__version__} does not know it, only plain LoRA"
            )
            raise ConfigError(
                f"{path}: {key} = {json.dumps(value)[:60]}: {why} can be aggregated or started from"
            )


def _number(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise ValueError(f"{key} = {value!r}")
    return kind(value)


def _patterns(fields: Mapping[str, Any], key: str, kind: type) -> dict[str, Any]:
    patterns = dict(fields.get(key) or {})
    for pattern in patterns:
        re.compile(pattern)
    return {pattern: _number(patterns, pattern, kind) for pattern in patterns}


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(error).partition("\n")[0]
