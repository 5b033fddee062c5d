"""One base model and one data set for all processes of a machine: in Ray's object store, mapped by each.

Nobody writes into what is mapped. A base that moves is a new object, made once a round by the driver and
mapped by all. Torch cannot protect the mapped pages, so each run ends with a comparison of hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clients.runtime import ClientRuntime, Key, RuntimeCache, SharedArrays, key_of, parts_of, runtime_of
from fedlora.config import RunConfig
from fedlora.core.base_patches import Patch
from fedlora.errors import RunFailed
from fedlora.models import pick_device
from fedlora.models.shared_memory import bytes_of, typed
from fedlora.simulation.ray_cluster import put

Hashes: TypeAlias = tuple[dict[str, str], dict[str, str]]
"""Of the pristine base and of the moved weights: name -> sha256."""


@dataclass(frozen=True, slots=True)
class SharedModelRef:
    """Reference to the shared model that a process maps; small, and travels with each message.

    Attributes:
        key: names the `ClientRuntime`.
        device: as ``engine.device``.
        parts: reference of the `SharedArrays`.
        chain: digests of the patches that are in the base.
        moved: reference of the weights that they changed, as bytes by layer; None for the pristine base.
    """

    key: Key
    device: str
    parts: Any
    chain: tuple[str, ...] = ()
    moved: Any = None


class SharedModel:
    """The driver's side: puts parts and moved weights into the object store, once each.

    Args:
        config: what the model and the data are.
        parts: what `parts_of` read for it.

    Attributes:
        ref: what processes are told; see `move_to`.
        runtime: the driver's own model on the same arrays, always on the CPU.
    """

    def __init__(self, config: RunConfig, parts: SharedArrays | None = None) -> None:
        if not config.engine.address:
            pick_device(config.engine.device)  # on a cluster its nodes decide
        parts = parts or parts_of(config, with_data=bool(config.engine.address))
        self.ref = SharedModelRef(key_of(config), config.engine.device, put(parts))
        del parts  # the driver maps it, too
        self.runtime = AttachedModel().attach(SharedModelRef(self.ref.key, "cpu", self.ref.parts))
        self._pristine = self.runtime.model.base_digests()
        self._moved: dict[str, str] = {}

    def move_to(self, patches: Sequence[Patch]) -> SharedModelRef:
        """The ref of the base with these patches in it; the weights of the one before are let go."""
        by_name = {patch.digest(): patch for patch in patches}
        chain = tuple(by_name)
        if chain != self.ref.chain:
            ref, runtime = self.ref, self.runtime
            runtime.move_to(chain, by_name.__getitem__)
            moved = {n: (tuple(w.shape), bytes_of(w)) for n, w in runtime.model.base.moved_weights.items()}
            reference = put(moved) if moved else None
            self.ref = SharedModelRef(ref.key, ref.device, ref.parts, chain, reference)
            if moved:
                runtime.model.base.adopt(chain, _weights(reference))
            self._moved = runtime.model.base.moved_digests()
        return self.ref

    def compare(self, found: Hashes) -> None:
        """Compare what `AttachedModel.base_hashes` gave in a process.

        Raises:
            RunFailed: a weight that a process changed although all share it.
        """
        for hashes, expected in zip(found, (self._pristine, self._moved), strict=True):
            for name, digest in hashes.items():
                if digest != expected.get(name):
                    raise RunFailed(
                        f"the base weight {name} was written to during the run, which all clients share: "
                        "no result of the run can be relied on"
                    )


class AttachedModel:
    """The side of a process: maps what a ref stands for.

    Attributes:
        runtimes: holds the model and data of the last ref, for the handler.
    """

    def __init__(self) -> None:
        self.runtimes = RuntimeCache()
        self._mapped: tuple[Any, ClientRuntime] | None = None

    def attach(self, ref: SharedModelRef) -> ClientRuntime:
        """The model and data of a ref; on the CPU, nothing of the base is copied.

        Raises:
            ConfigError: the device is not there.
        """
        import ray

        if self._mapped is None or self._mapped[0] != ref.parts:
            self._mapped, self.runtimes = None, RuntimeCache()  # two models at a time might be too many
            parts: SharedArrays = ray.get(ref.parts)
            self._mapped = ref.parts, runtime_of(parts, ref.device)
            self.runtimes.hold(ref.key, self._mapped[1])
        runtime = self._mapped[1]
        if runtime.base != ref.chain:
            runtime.adopt(ref.chain, _weights(ref.moved))
        return runtime

    def base_hashes(self, ref: SharedModelRef) -> Hashes:
        """Hashes of the pristine base and of the moved weights; empty where this process uses others."""
        if self._mapped is None or self._mapped[0] != ref.parts:
            return {}, {}
        runtime = self._mapped[1]
        return (
            runtime.model.base_digests(),
            runtime.model.base.moved_digests() if runtime.base == ref.chain else {},
        )


def _weights(moved: Any) -> dict[str, Tensor]:
    import ray

    found = {} if moved is None else ray.get(moved)
    return {name: typed(array, torch.float32, shape) for name, (shape, array) in found.items()}
