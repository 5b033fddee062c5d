"""Whether two runs are the same: the keys that decide, the code that decides, and what both only name.

A run's identity stands in its ``provenance.json``; runs of the same identity have the same result, to
the last bit on the same kind of processor. Hardware is no part of it and stands beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig, to_flat
from fedlora.core.code import code_root, top_packages, version_of

NO_EFFECT = ("output-dir", "resume", "save-total-limit", "engine.", "study.", "tracking.")
"""Beginnings of keys that do not change a result: where it goes, which processes compute it, what it is
compared with, who else is told. The engine's two that change bits, device and size of cohorts, are inputs."""
ADDED = {
    "train.optimizer-options": "",
    "lora.method-options": "",
    "upload": "",
    "privacy.neighboring-relation": "zero_out_one",
    "privacy.declared-examples": 0,
    "privacy.unit-column": "",
    "privacy.max-unit-examples": 16,
    "privacy.clip-shares": "",
    "privacy.target-quantile": 0.5,
    "privacy.clip-learning-rate": 0.2,
    "privacy.count-noise": 0.0,
    "privacy.noise-bands": 1,
    "strategy.allocation": "all",
    "strategy.allocation-options": "",
    "max-rank": 0,
    "model.adapter": "",
    "data.evaluation-sets": "",
    "train.micro-batch-size": 0,
    "train.pass-memory": 0.0,
    "train.packing": False,
    "train.dpo-beta": 0.1,
    "model.dtype": "float32",
    "license": "",
    "generate-every": 0,
    "evaluation-precision": "float32",
    "early-stopping-patience": 0,
    "early-stopping-threshold": 0.0,
    "load-best-model-at-end": False,
    "metric-for-best-model": "loss",
    "train.schedule": "constant",
    "train.schedule-over": "round",
    "train.schedule-floor": 0.0,
    "train.warmup-steps": 0,
    "train.alternating": False,
    "train.nested-ranks": False,
    "train.control-variates": False,
    "train.gradient": "backward",
    "train.perturbation-size": 0.001,
    "lora.personal-rank": 0,
    "lora.personal-weights": "one",
    "secure.mode": "none",
    "secure.min-clients": 3,
    "secure.threshold": 0.66,
    "secure.bits": 32,
    "secure.largest-change": 1.0,
    "secure.max-weight": 0,
    "secure.sketch-size": 0,
    "secure.noise": "none",
    "secure.colluding": 1,
    "devices.profiles": "",
    "devices.trace": "",
    "devices.deadline": 0.0,
    "devices.over-selection": 1.0,
    "devices.buffer-size": 0,
    "devices.in-flight": 0,
    "devices.tiers": 0,
    "devices.max-staleness": 0,
    "devices.staleness": "sqrt",
    "max-missed-rounds": 2,
    "strategy.screening": "auto",
    "strategy.largest-share": 2.0,
    "strategy.max-relative-norm": 2.0,
}
"""Keys that came after runs had been kept: at this default they mean what their absence meant."""
LIBRARIES = (
    "torch", "numpy", "scipy", "transformers", "tokenizers", "peft", "opacus", "dp-accounting", "flwr",
    "flwr-datasets", "bitsandbytes",
)  # fmt: skip
"""Whose versions are part of the code: they compute, tokenise, partition or account."""
APART = (
    "fedlora/study/", "fedlora/cli/", "fedlora/audit/", "fedlora/merge/", "fedlora/evaluation/",
    "fedlora/watch/", "fedlora/server/tracking.py", "fedlora/server/progress.py",
)  # fmt: skip
"""Beginnings of files that no result of a run rests on: they choose, show or use runs. Most of
``fedlora/deployment`` would be others, but simulated clients, too, go through it."""
UNRECORDED = "not recorded"
_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Identity:
    """Digests of all that decides the result of a run.

    Attributes:
        config: of the keys that have an effect.
        code: of all modules but `APART` and the versions of `LIBRARIES`; several, joined by ``+``, where a
            run was begun by one and continued by another.
        inputs: of the weights and examples that the configuration names, see `fedlora.server.inputs`;
            several, joined by ``+``, where a run was begun on one kind of device and continued on another;
            None where not all of them are known in one place.
    """

    config: str
    code: str
    inputs: str | None

    @property
    def last_inputs(self) -> str | None:
        """Inputs of the last rounds: those before had the same, but for the kind of device."""
        return None if self.inputs is None else self.inputs.rpartition("+")[2]


def identity(config: RunConfig, inputs: str | None, before: Identity | None = None) -> Identity:
    """A run's, by today's code.

    Args:
        config: as it runs.
        inputs: see `Identity`.
        before: what the rounds that it goes on after were run with, if it does.
    """
    now = Identity(config_digest(config), code_digest(), inputs)
    if before is None or before == now:
        return now
    if now.inputs is None or before.inputs is None:
        return Identity(now.config, _joined(before.code, now.code), None)
    return Identity(now.config, _joined(before.code, now.code), _joined(before.inputs, now.inputs))


def _joined(before: str, now: str) -> str:
    """Digests of what a run rested on, one after the other.

    >>> _joined("a+b", "b"), _joined("a+b", "c")
    ('a+b', 'a+b+c')
    """
    return before if before.rpartition("+")[2] == now else f"{before}+{now}"


def recorded(provenance: Mapping[str, Any]) -> Identity | None:
    """The identity in a ``provenance.json``; None where there is none, as in older ones.

    >>> recorded({"identity": {"config": "a", "code": "b", "inputs": None}})
    Identity(config='a', code='b', inputs=None)
    """
    found = provenance.get("identity")
    try:
        return Identity(**found) if isinstance(found, dict) else None
    except TypeError:
        return None


def code_of(provenance: Mapping[str, Any]) -> str:
    """Identity of the code that computed a run, for people and for comparisons."""
    found = recorded(provenance)
    return UNRECORDED if found is None else found.code


def config_digest(config: RunConfig) -> str:
    """A digest of all keys but those without effect, and `ADDED` ones at their default."""
    keys = {
        key: value
        for key, value in to_flat(config).items()
        if not key.startswith(NO_EFFECT) and (key, value) not in ADDED.items()
    }
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:_LENGTH]


@lru_cache(maxsize=1)
def code_digest() -> str:
    """A digest of the code that runs rest on, as it was when it was first asked for."""
    versions = {name: version_of(name) for name in LIBRARIES}
    sources = source_digest(code_root(), top_packages(), APART)
    return hashlib.sha256(json.dumps([sources, versions]).encode()).hexdigest()[:_LENGTH]


def source_digest(root: Path, packages: Collection[str], apart: tuple[str, ...] = ()) -> str:
    """A digest of the Python files of some packages, by name and content.

    Args:
        root: the directory in which the packages lie.
        packages: their paths below it.
        apart: beginnings of paths that do not count.
    """
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted((root / package).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            if not name.startswith(apart):
                digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:_LENGTH]
