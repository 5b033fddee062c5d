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

from clients.resident import Key, Parts, Resident, key_of, parts_of, resident_of
from fedlora.config import RunConfig
from fedlora.engines.cluster import put
from fedlora.errors import RunFailed
from fedlora.models import pick_device
from fedlora.models.shared import bytes_of, typed
from fedlora.updates import Patch

Hashes: TypeAlias = tuple[dict[str, str], dict[str, str]]
"""Of the pristine base and of the moved weights: name -> sha256."""


@dataclass(frozen=True, slots=True)
class Loan:
    """What a process must map to carry out a run's messages; small, and travels with each of them.

    Attributes:
        key: names the `Resident`.
        device: as ``engine.device``.
        parts: reference of the `Parts`.
        chain: digests of the patches that are in the base.
        moved: reference of the weights that they changed, as bytes by layer; None for the pristine base.
    """

    key: Key
    device: str
    parts: Any
    chain: tuple[str, ...] = ()
    moved: Any = None


class Lender:
    """The driver's side: puts parts and moved weights into the object store, once each.

    Args:
        config: what the model and the data are.
        parts: what `parts_of` read for it.

    Attributes:
        loan: what processes are told; see `move_to`.
        worker: the driver's own model on the same arrays, always on the CPU.
    """

    def __init__(self, config: RunConfig, parts: Parts | None = None) -> None:
        if not config.engine.address:
            pick_device(config.engine.device)  # on a cluster its nodes decide
        parts = parts or parts_of(config, with_data=bool(config.engine.address))
        self.loan = Loan(key_of(config), config.engine.device, put(parts))
        del parts  # the driver maps it, too
        self.worker = borrow(Loan(self.loan.key, "cpu", self.loan.parts))
        self._pristine = self.worker.model.base_digests()
        self._moved: dict[str, str] = {}

    def move_to(self, patches: Sequence[Patch]) -> Loan:
        """The loan of the base with these patches in it; the weights of the one before are let go."""
        by_name = {patch.digest(): patch for patch in patches}
        chain = tuple(by_name)
        if chain != self.loan.chain:
            loan, worker = self.loan, self.worker
            worker.move_to(chain, by_name.__getitem__)
            moved = {n: (tuple(w.shape), bytes_of(w)) for n, w in worker.model.base.moved_weights.items()}
            reference = put(moved) if moved else None
            self.loan = Loan(loan.key, loan.device, loan.parts, chain, reference)
            if moved:
                worker.model.base.adopt(chain, _weights(reference))
            self._moved = worker.model.base.moved_digests()
        return self.loan

    def compare(self, found: Hashes) -> None:
        """Compare what `base_hashes` gave in a process.

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


_mapped: list[tuple[Any, Resident]] = []
"""The loan that this process uses: its parts' reference, and what was made of it."""


def borrow(loan: Loan) -> Resident:
    """This process's model and data as lent; on the CPU, nothing of the base is copied.

    Raises:
        ConfigError: the device is not there.
    """
    import ray

    if not _mapped or _mapped[0][0] != loan.parts:
        _mapped.clear()
        parts: Parts = ray.get(loan.parts)
        _mapped.append((loan.parts, resident_of(parts, loan.key, loan.device)))
    worker = _mapped[0][1]
    if worker.base != loan.chain:
        worker.adopt(loan.chain, _weights(loan.moved))
    return worker


def base_hashes(loan: Loan) -> Hashes:
    """Hashes of the pristine base and of the moved weights; empty where this process uses others."""
    if not _mapped or _mapped[0][0] != loan.parts:
        return {}, {}
    worker = _mapped[0][1]
    return worker.model.base_digests(), worker.model.base.moved_digests() if worker.base == loan.chain else {}


def _weights(moved: Any) -> dict[str, Tensor]:
    import ray

    found = {} if moved is None else ray.get(moved)
    return {name: typed(array, torch.float32, shape) for name, (shape, array) in found.items()}
