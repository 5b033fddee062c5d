"""What one process keeps between messages: the prepared data and one base model with adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from fedlora.adapters import AdapterKind, adapter_kind
from fedlora.config import RunConfig, from_flat
from fedlora.core.state import Patch
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
from fedlora.tasks import task_named

Key: TypeAlias = tuple[Any, ...]
"""Names a `ClientRuntime`, see `key_of`."""


@dataclass(slots=True)
class ClientRuntime:
    """A model and its data.

    Attributes:
        model: the base with LoRA injected; whatever a client leaves in it is overwritten by the next.
        data: tokenised examples and who holds which.
        modules: the adapted layers that each ``target-modules`` string of the configuration means.
        base: digests of the patches P_1 .. P_v that are in the weights, in order.
    """

    model: AdaptedModel
    data: Prepared
    modules: Mapping[str, tuple[str, ...]]
    base: tuple[str, ...] = ()

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


_runtimes: dict[Key, ClientRuntime] = {}


def client_runtime(config: RunConfig, own: OwnData | None = None) -> ClientRuntime:
    """This process's model and data for a configuration; made anew only when either changes.

    Args:
        config: the run.
        own: a node's own examples, in the place of the run's.

    Raises:
        ConfigError: a model, target modules, data or partition that cannot be had.
    """
    key = key_of(config) if own is None else (*key_of(config), own)
    if key not in _runtimes:
        _, data, network, modules = _read(config, own)
        kind = adapter_kind(config.lora, config.seed)
        return _settle(key, network, data, modules, kind, config.engine.device)
    return _runtimes[key]


def key_of(config: RunConfig) -> Key:
    """What a `ClientRuntime` is made from: configurations with the same key share one."""
    kind = adapter_kind(config.lora, config.seed)
    return (config.task, config.model, _targets(config), config.data, config.seed, config.engine.device, kind)


@dataclass(frozen=True, slots=True)
class SharedArrays:
    """What processes can share of a `ClientRuntime`: the arrays are only read, so that they may be mapped.

    Attributes:
        structure, arrays: the model, see `fedlora.models.shared_memory`.
        data: the prepared data, or where it lies.
        modules: as in `ClientRuntime`.
        kind: of the adapter.
    """

    structure: bytes
    arrays: list[np.ndarray]
    data: Prepared | Path
    modules: Mapping[str, tuple[str, ...]]
    kind: AdapterKind


def parts_of(config: RunConfig, *, with_data: bool = False) -> SharedArrays:
    """Read what a configuration's `ClientRuntime` is made from; ``with_data`` for machines without the cache.

    Raises:
        ConfigError: a model, target modules, data or partition that cannot be had.
    """
    path, data, network, modules = _read(config)
    structure, arrays = take_apart(network)
    kind = adapter_kind(config.lora, config.seed)
    return SharedArrays(structure, arrays, data if with_data else path, modules, kind)


def runtime_of(parts: SharedArrays, key: Key, device: str) -> ClientRuntime:
    """Make these parts the process's own: `client_runtime` gives them from now on; returns them.

    Args:
        parts: mapped or not; on the CPU the model's tensors are views of them.
        key: what `client_runtime` will be asked for.
        device: as ``engine.device``.

    Raises:
        ConfigError: the device is not there.
    """
    data = open_prepared(parts.data) if isinstance(parts.data, Path) else parts.data
    network = put_together(parts.structure, parts.arrays)
    return _settle(key, network, data, parts.modules, parts.kind, device)


def _settle(
    key: Key,
    network: nn.Module,
    data: Prepared,
    modules: Mapping[str, tuple[str, ...]],
    kind: AdapterKind,
    device: str,
) -> ClientRuntime:
    _runtimes.clear()
    adapted = dict.fromkeys(name for names in modules.values() for name in names)
    network.to(pick_device(device))
    model = AdaptedModel(network, list(adapted), task_named(data.task), kind)
    _runtimes[key] = ClientRuntime(model, data, modules)
    return _runtimes[key]


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
