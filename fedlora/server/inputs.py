"""Digest of the inputs that a configuration names and does not hold: weights, examples, device.

A backbone that was pretrained here, a file, a hub's newest version: under one name they can be something else
tomorrow or on another machine. So what counts is their content, as the run has it in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from clients.runtime import ClientRuntime
from fedlora.assets.fetch import file_sha256
from fedlora.config import RunConfig
from fedlora.core.files import user_path
from fedlora.data.examples import Examples
from fedlora.models import pick_device
from fedlora.models.peft_names import TENSORS_FILE
from fedlora.models.shared_memory import hashes
from fedlora.prepared.cache import Prepared
from fedlora.server.public_data import open_public

DEVICES = ("cpu", "cuda", "mps")
"""Kinds of device; a run may begin on one and go on on another."""


def inputs_digest(config: RunConfig, runtime: ClientRuntime) -> str | None:
    """The digest of a run's inputs on the device that it computes on; see `inputs_by_device`.

    None where something is not known here, be it the device, where the machines of a cluster choose it.
    """
    device = device_of(config)
    return None if device is None else inputs_by_device(config, runtime).get(device)


def inputs_by_device(config: RunConfig, runtime: ClientRuntime) -> dict[str, str]:
    """A digest of the base, the first head, the examples and who holds which, and the size of cohorts.

    One for each kind of device, which is part of it. Empty where something is not known here: the code of a
    rule or an optimiser of one's own, which may lie anywhere; what others spent of a ledger that the run
    shares with them.

    Args:
        config: as it runs: ``engine.cohort-size`` is decided.
        runtime: its model and data.
    """
    if ":" in config.strategy.name + config.train.optimizer + config.lora.method or config.privacy.ledger:
        return {}
    model = runtime.model
    found = {
        "base": base_parts(runtime),
        "head": sorted(hashes(model.initial_head).items()),
        "data": data_parts(runtime.data),
        "public": data_parts(open_public(config)) if config.data.public else None,
        "device": "",
        "cohort-size": config.engine.cohort_size or 1,
    }
    if config.model.adapter:
        found["adapter"] = file_sha256(user_path(config.model.adapter) / TENSORS_FILE)
    if config.devices.trace:
        found["devices"] = hashlib.sha256(Path(config.devices.trace).read_bytes()).hexdigest()
    return {device: digest_of({**found, "device": device}) for device in DEVICES}


def device_of(config: RunConfig) -> str | None:
    """The kind of device that a run computes on; None where the machines of a cluster choose it."""
    device: str = config.engine.device
    if device != "auto":
        return device
    return None if config.engine.address else str(pick_device(device).type)


def digest_of(parts: object) -> str:
    """A digest of parts that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def base_parts(runtime: ClientRuntime) -> list[tuple[str, str]]:
    """The hash of each tensor of the base, by name."""
    return sorted(runtime.model.base_digests().items())


def data_parts(data: Prepared) -> list[object]:
    """Hashes of the examples as the model sees them, and of who holds which."""
    parts = (data.train, data.test, *data.sets.values())
    return [*_names(data), _array(data.flat), _array(data.offsets), *map(_examples, parts)]


def evaluated_parts(data: Prepared) -> list[object]:
    """Hashes of the examples that models are measured on, with the names of their sets."""
    return [*_names(data), list(data.sets), *map(_examples, (data.test, *data.sets.values()))]


def _names(data: Prepared) -> list[object]:
    return [data.label_names, data.domain_names, data.pad_token_id, data.task]


def _examples(examples: Examples) -> list[str | None]:
    arrays = (getattr(examples, name) for name in ("tokens", "offsets", "labels", "domains", "counted"))
    found = [repr(examples.image), *(None if array is None else _array(array) for array in arrays)]
    more = (a for a in (examples.types, examples.splits, examples.targets) if a is not None)
    return [*found, *map(_array, more)]


def _array(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
