"""What one process keeps between messages: the prepared data and one base model with adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedlora.config import RunConfig, from_flat
from fedlora.data.prepared import Prepared, open_prepared, prepare
from fedlora.models import AdaptedModel, build_model, pick_device, resolve_targets
from fedlora.updates import Patch


@dataclass(slots=True)
class Resident:
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
            self.model.reset_base()
            self.base = ()
        for name in wanted[len(self.base) :]:
            self.model.move_base([patch_of(name)], since=len(self.base))
            self.base = (*self.base, name)


def configured(run_config: Mapping[str, Any]) -> RunConfig:
    """The checked configuration behind Flower's run-config; decoded once for each distinct one."""
    return _configured(tuple(sorted(run_config.items())))


@lru_cache(maxsize=8)
def _configured(items: tuple[tuple[str, Any], ...]) -> RunConfig:
    return from_flat(dict(items))


_residents: dict[tuple[Any, ...], Resident] = {}


def resident(config: RunConfig) -> Resident:
    """This process's model and data for a configuration; made anew only when either changes.

    Raises:
        ConfigError: a model, target modules, data or partition that cannot be had.
    """
    targets = tuple(dict.fromkeys([config.lora.target_modules, *_own_targets(config)]))
    key = (config.model, targets, config.data, config.seed, config.engine.device)
    if key not in _residents:
        data = open_prepared(prepare(config))
        _residents.clear()
        network = build_model(config.model, data.num_labels, config.seed)
        modules = {target: resolve_targets(network, target) for target in targets}
        adapted = dict.fromkeys(name for names in modules.values() for name in names)
        network.to(pick_device(config.engine.device))
        _residents[key] = Resident(AdaptedModel(network, list(adapted)), data, modules)
    return _residents[key]


def _own_targets(config: RunConfig) -> list[str]:
    return [g.target_modules for g in config.groups if g.target_modules is not None]
