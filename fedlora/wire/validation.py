"""Whether the settings of an instruction are what `fedlora.wire.instruction.instruction_config` writes.

A client does what they say, so nothing in them may lead it elsewhere: names of files are held to a form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedlora.core.factors import FACTORS
from fedlora.core.init_drawn import DRAWN
from fedlora.errors import UpdateRefused
from fedlora.wire.arrays import read_json
from fedlora.wire.upload import CODECS

_DIGEST = re.compile(r"[0-9a-f]{64}")
_RUN_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}(\.[A-Za-z0-9_]{1,64}){0,3}")
LARGEST = 2**24
"""Of a layer's features: no model has more."""


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse settings that are missing or of a wrong type.

    Raises:
        UpdateRefused: the first that is wrong.
    """
    digests = [config.get("needs-frozen"), config.get("needs-moving", "")]
    sound = {
        "server-round": isinstance(config.get("server-round"), int),
        "run-key": bool(_RUN_KEY.fullmatch(str(config.get("run-key", "run")))),
        "ledger-head": config.get("ledger-head", "") == "" or _is_digest(config["ledger-head"]),
        "needs-base": _are_digests(config.get("needs-base", [])),
        "base-sum-of": _are_digests(config.get("base-sum-of", [])),
        "needs-layers": _are_digests(config.get("needs-layers", [])),
        "needs-frozen, needs-moving": all(name == "" or _is_digest(name) for name in digests),
        "rank": isinstance(config.get("rank"), int) and 1 <= config["rank"] <= LARGEST,
        "scaling": _is_number(config.get("scaling")),
        "tensors": config.get("tensors", "") == "" or _are_tensors(config["tensors"]),
        "trained, uploaded": all(_are_among(config, config.get(name)) for name in ("trained", "uploaded")),
        "modules": _are_names(config.get("modules")),
        "tail-weight, tail-start": _is_number(config.get("tail-weight", 0.0))
        and isinstance(config.get("tail-start", 0), int)
        and config.get("tail-start", 0) >= 0
        and ("tail-weight" in config) == ("tail-start" in config),
        "moves-base": isinstance(config.get("moves-base", False), bool),
        "fresh": _is_fresh(config.get("fresh")),
        "choose": isinstance(config.get("choose", 0), int) and config.get("choose", 0) >= 0,
        "upload-seed": isinstance(config.get("upload-seed", 0), int),
        "upload-turn": isinstance(config.get("upload-turn", 0), int),
    }
    for keys, holds in sound.items():
        if not holds:
            raise UpdateRefused(f"the message's {keys} cannot be read")
    if str(config.get("upload", "float32")) not in CODECS:
        raise UpdateRefused(f"upload = {config['upload']!r}: this client knows {', '.join(CODECS)}")


def check_range(tensors: Mapping[str, Tensor], largest: float) -> None:
    """Refuse values that are not finite, or larger in size.

    Raises:
        UpdateRefused: the first tensor that has one.
    """
    for name, tensor in tensors.items():
        size = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not size <= largest:
            raise UpdateRefused(
                f"{name}: a value of size {size:g} was received, at most {largest:g} is taken"
            )


def _are_digests(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_digest, value))


def _are_tensors(value: object) -> bool:
    """Whether it is a sorted comma list of names of tensors, which lead nowhere else."""
    if not isinstance(value, str):
        return False
    names = value.split(",")
    return names == sorted(set(names)) and all(map(_NAME.fullmatch, names))


def _are_among(config: Mapping[str, Any], value: object) -> bool:
    """Whether it is a sorted comma list of some of the layer's tensors, LoRA's unless they are named."""
    if not isinstance(value, str):
        return False
    known = set(str(config["tensors"]).split(",")) if config.get("tensors") else FACTORS
    names = list(filter(None, value.split(",")))
    return names == sorted(set(names)) and known.issuperset(names) and ",".join(names) == value


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_names(text: object) -> bool:
    found = read_json(text)
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def _is_fresh(text: object) -> bool:
    """Whether it is what `instruction_config` writes: seed, init-a, and module -> [out, in]."""
    if text is None:
        return True
    match read_json(text):
        case {"seed": int(), "init-a": str(kind), "shapes": dict(shapes)} if kind in DRAWN:
            return all(_is_shape(shape) for shape in shapes.values())
    return False


def _is_shape(value: object) -> bool:
    match value:
        case [int(out), int(inner)]:
            return 0 < out <= LARGEST and 0 < inner <= LARGEST
    return False
