"""Keeps the prepared data and one base model with adapters between the messages of a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from fedlora.adapters import AdapterKind, adapter_kind
from fedlora.config import RunConfig, from_flat
from fedlora.core.base_patches import Patch
from fedlora.core.state import State
from fedlora.data.chat.template import chat_settings
from fedlora.models import (
    AdaptedModel,
    build_model,
    check_fit,
    pick_device,
    resolve_targets,
)
from fedlora.models.shared_memory import put_together, take_apart
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.prepared.node_data import OwnData, own_data
from fedlora.tasks import Task, task_named, task_of

Key: TypeAlias = tuple[Any, ...]
"""Names a `ClientRuntime`, see `key_of`."""


@dataclass(slots=True)
class ClientRuntime:
    """Model and data that messages are carried out with.

    Attributes:
        model: the base with LoRA injected; whatever a client leaves in it is overwritten by the next.
        data: tokenised examples and who holds which.
        modules: the adapted layers that each ``target-modules`` string of the configuration means.
        base: digests of the patches P_1 .. P_v that are in the weights, in order.
        whole: files of a client's store that were found whole, each with its time and size then.
    """

    model: AdaptedModel
    data: Prepared
    modules: Mapping[str, tuple[str, ...]]
    base: tuple[str, ...] = ()
    whole: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def move_to(self, chain: Sequence[str], patch_of: Callable[[str], Patch]) -> None:
        """Bring the base weights to a chain of patches: apply what is new, or start again from W_0.

        The weights are always W_0 + P_1 + .. + P_v added one by one, so that the bits do not depend on
        which version this process was at.

        Args:
            chain: digests of P_1 .. P_v.
            patch_of: the patch of a digest.
        """
        wanted = tuple(chain)
        if wanted[: len(self.base)] != self.base:
            self.model.base.reset()
            self.base = ()
        for name in wanted[len(self.base) :]:
            self.model.base.move([patch_of(name)], since=len(self.base))
            self.base = (*self.base, name)

    def load_state(self, state: State) -> None:
        """Make the model the global one of a state: base, adapter and head."""
        patches = {patch.digest(): patch for patch in state.base}
        self.move_to(tuple(patches), patches.__getitem__)
        self.model.load(state.adapters, state.head)

    def adopt(self, chain: Sequence[str], weights: Mapping[str, Tensor]) -> None:
        """Bring the base weights to a chain that another process has applied; see `PatchedBase.adopt`."""
        if tuple(chain) != self.base:
            self.model.base.adopt(chain, weights)
            self.base = tuple(chain)


def configured(run_config: Mapping[str, Any]) -> RunConfig:
    """The checked configuration behind Flower's run-config; decoded once for each distinct one."""
    return _configured(tuple(sorted(run_config.items())))


@lru_cache(maxsize=8)
def _configured(items: tuple[tuple[str, Any], ...]) -> RunConfig:
    return from_flat(dict(items))


class RuntimeCache:
    """Holds the last `ClientRuntime` of a process, which is made anew only when its key changes.

    Whoever starts the process owns it and hands it to the handler: an actor, a node's model server, an engine
    in this process.
    """

    def __init__(self) -> None:
        self._held: tuple[Key, ClientRuntime] | None = None

    def get(self, config: RunConfig, own: OwnData | None = None) -> ClientRuntime:
        """The model and data of a configuration.

        Args:
            config: the run.
            own: a node's own examples, in the place of the run's.

        Raises:
            ConfigError: a model, target modules, data or partition that cannot be had.
        """
        key = key_of(config) if own is None else (*key_of(config), own)
        if self._held is None or self._held[0] != key:
            self._held = None  # two models at a time might be too many
            self._held = key, read_runtime(config, own)
        return self._held[1]

    def hold(self, key: Key, runtime: ClientRuntime) -> None:
        """Hold what was made elsewhere."""
        self._held = key, runtime


def read_runtime(config: RunConfig, own: OwnData | None = None) -> ClientRuntime:
    """The model and data of a configuration, read; for the arguments and errors see `RuntimeCache.get`."""
    _, data, network, modules = _read(config, own)
    kind = adapter_kind(config.lora, config.seed)
    return _runtime(network, data, modules, kind, task_of(config), config.engine.device)


@lru_cache(maxsize=8)
def key_of(config: RunConfig) -> Key:
    """Key of a `ClientRuntime`: configurations with the same key share one."""
    kind = adapter_kind(config.lora, config.seed)
    data = config.data, config.privacy.unit_column
    return (task_of(config), config.model, _targets(config), *data, config.seed, config.engine.device, kind)


@dataclass(frozen=True, slots=True)
class SharedArrays:
    """Shareable arrays of a `ClientRuntime`: they are only read, so that processes may map them.

    Attributes:
        structure, arrays: the model, see `fedlora.models.shared_memory`.
        data: the prepared data, or where it lies.
        modules: as in `ClientRuntime`.
        kind: of the adapter.
        task: of the run.
    """

    structure: bytes
    arrays: list[np.ndarray]
    data: Prepared | Path
    modules: Mapping[str, tuple[str, ...]]
    kind: AdapterKind
    task: Task


def parts_of(config: RunConfig, *, with_data: bool = False) -> SharedArrays:
    """Read what a configuration's `ClientRuntime` is made from; ``with_data`` for machines without the cache.

    Raises:
        ConfigError: a model, target modules, data or partition that cannot be had.
    """
    path, data, network, modules = _read(config)
    structure, arrays = take_apart(network)
    kind = adapter_kind(config.lora, config.seed)
    return SharedArrays(structure, arrays, data if with_data else path, modules, kind, task_of(config))


def runtime_of(parts: SharedArrays, device: str) -> ClientRuntime:
    """The model and data on these parts, mapped or not; on the CPU the model's tensors are views of them.

    Raises:
        ConfigError: the device is not there.
    """
    data = open_prepared(parts.data) if isinstance(parts.data, Path) else parts.data
    network = put_together(parts.structure, parts.arrays)
    return _runtime(network, data, parts.modules, parts.kind, parts.task, device)


def _runtime(
    network: nn.Module,
    data: Prepared,
    modules: Mapping[str, tuple[str, ...]],
    kind: AdapterKind,
    task: Task,
    device: str,
) -> ClientRuntime:
    adapted = dict.fromkeys(name for names in modules.values() for name in names)
    network.to(pick_device(device))
    model = AdaptedModel(network, list(adapted), task, kind)
    return ClientRuntime(model, data, modules)


def _read(
    config: RunConfig, own: OwnData | None = None
) -> tuple[Path, Prepared, nn.Module, dict[str, tuple[str, ...]]]:
    task = task_named(config.task)
    if own is None:
        path = prepare(config)
        data = open_prepared(path)
    else:
        path, data = (
            own.home,
            own_data(own, config.model.name, config.data.max_length, task, chat_settings(config)),
        )
    network = build_model(config.model, data.num_labels, config.seed, task.network)
    check_fit(config.model, network, data, config.data.max_length)
    return path, data, network, {target: resolve_targets(network, target) for target in _targets(config)}


def _targets(config: RunConfig) -> tuple[str, ...]:
    own = [g.target_modules for g in config.groups if g.target_modules is not None]
    return tuple(dict.fromkeys([config.lora.target_modules, *own]))
