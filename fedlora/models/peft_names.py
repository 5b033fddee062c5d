"""Names in adapters of other people: what wrappers and raw state dicts added to them is taken off again.

PEFT's own names are ``base_model.model.<module>.lora_A.weight``. A model that was wrapped before it was saved
has the wrapper's attribute in between, which no other model has; a state dict that was saved by hand has the
adapter's name (``lora_A.default.weight``), which PEFT leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.core.peft_keys import PREFIX
from fedlora.errors import ConfigError

TENSORS_FILE = "adapter_model.safetensors"
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "_module": "Opacus",
}
"""Attributes under which a wrapper keeps the module that it wraps, wherever in a name they stand."""
OUTER = "module"
"""That of DDP and DataParallel: an ordinary word, so it counts at the root of a model alone."""
WRAPPER_CLASSES = frozenset({
    "OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel",
    "CheckpointWrapper", "GradSampleModule", "DeepSpeedEngine",
})  # fmt: skip
"""Classes that say nothing of the base inside."""
OTHER_FORMATS = (
    (r"^lora_(unet|te\d?|transformer)_|\.lora_(down|up)\.weight$|\.lora_mid\.", "kohya"),
    (r"^(unet|text_encoder(_\d)?)\.|_transformer_blocks\.|^transformer\.transformer_blocks\.|\.processor\.|_?lora\.(down|up)\.",
     "diffusers"),
    (r"\.lora_[ab](\.weight)?$", "MLX or torchtune"),
    (r"\.(hada_w|lokr_w|oft_|on_input|diff)", "LyCORIS"),
)  # fmt: skip
"""Spellings of tensors by which other programs can be told."""

_INNER = re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(WRAPPERS)})(\\?\.)")
_ADAPTER = re.compile(r"\.(lora_(?:embedding_)?[AB])\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?$")
_LORA_EXTRA = re.compile(r"\.(lora_magnitude_vector)\.(?!weight$)([^.]+)(\.weight)?$")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)\.")
_NAME_FIELDS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_PATTERN_FIELDS = ("rank_pattern", "alpha_pattern")


def plain_names(keys: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each key's plain spelling, and the wrappers that were taken off, by their attributes.

    Copies that PEFT keeps of modules before training (``original_module``) get no entry.

    Raises:
        ConfigError: names of another program, of two adapters in one file, or two that become one.

    >>> plain_names(["base_model.model._orig_mod.q.lora_A.me.weight"])
    ({'base_model.model._orig_mod.q.lora_A.me.weight': 'base_model.model.q.lora_A.weight'}, ('_orig_mod',))
    """
    keys = sorted(keys)
    found: set[str] = set()
    inner = {key: _without_inner(key, found) for key in keys if ".original_module." not in key}
    outside = {key: name.removeprefix(f"{OUTER}.") for key, name in inner.items()}
    if any(outside[key] != name for key, name in inner.items()):
        found.add(OUTER)
    for key, name in outside.items():
        if not name.startswith(PREFIX):
            raise ConfigError(f"{key}: {_foreign(key)}PEFT's names begin with {PREFIX}")
    root = f"{PREFIX}{OUTER}."
    if outside and all(name.startswith(root) for name in outside.values()):
        found.add(OUTER)
        outside = {key: PREFIX + name.removeprefix(root) for key, name in outside.items()}
    adapters: set[str] = set()
    names = {key: _without_adapter(name, adapters) for key, name in outside.items()}
    if len(adapters) > 1:
        raise ConfigError(f"holds the adapters {', '.join(sorted(adapters))}: save one of them in a file")
    owners: dict[str, str] = {}
    for key, name in names.items():
        if owners.setdefault(name, key) != key:
            raise ConfigError(f"{owners[name]} and {key} are one name without their wrappers")
    return names, tuple(sorted(found))


def plain_fields(fields: Mapping[str, Any], wrappers: Iterable[str]) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` without wrappers in names, patterns and classes.

    >>> plain_fields({"target_modules": ["_orig_mod.q", "module.v"]}, ["_orig_mod", "module"])
    {'target_modules': ['q', 'v']}
    """
    outer = OUTER in set(wrappers)

    def plain(name: Any) -> Any:
        if isinstance(name, list):
            return [plain(each) for each in name]
        if not isinstance(name, str):
            return name
        name = _INNER.sub("", name)
        return re.sub(rf"^(\W*){OUTER}\\?\.", r"\1", name) if outer else name

    changed: dict[str, Any] = {key: plain(fields[key]) for key in _NAME_FIELDS if key in fields}
    for key in _PATTERN_FIELDS:
        if isinstance(fields.get(key), dict):
            changed[key] = {plain(name): value for name, value in fields[key].items()}
    mapping = fields.get("auto_mapping")
    if isinstance(mapping, dict) and mapping.get("base_model_class") in WRAPPER_CLASSES:
        changed["auto_mapping"] = None
    return {**fields, **changed}


def _without_inner(key: str, found: set[str]) -> str:
    found.update(part for part in key.split(".") if part in WRAPPERS)
    return _INNER.sub("", key)


def _without_adapter(name: str, adapters: set[str]) -> str:
    for pattern in (_ADAPTER, _LORA_EXTRA):
        if match := pattern.search(name):
            adapters.add(match[2])
            return f"{name[: match.start()]}.{match[1]}{match[3] or ''}"
    if match := _SAVED.search(name):
        adapters.add(match[1])
        return f"{name[: match.start()]}.{name[match.end() :]}"
    return name


def _foreign(key: str) -> str:
    for pattern, program in OTHER_FORMATS:
        if re.search(pattern, key):
            return f"a name of {program}, "
    return ""
