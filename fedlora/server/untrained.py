"""What the model does before round 1, measured once for all runs of a study that begin with the same model.

The first of them leaves it in the study's directory, under a digest of all that the figures depend on; a run
of the same digest reads it and says whose it is. Their bits are those that it would have measured itself.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fedlora.core.adapters import LayerAdapter
from fedlora.core.base_patches import digest
from fedlora.core.factors import LoraFactors
from fedlora.core.files import write_atomic
from fedlora.core.sealed import read_sealed, sealed
from fedlora.data.tokenizers import load_tokenizer
from fedlora.errors import ConfigError
from fedlora.models.shared_memory import hashes
from fedlora.server.evaluator import GlobalEvaluator
from fedlora.server.identity import code_digest
from fedlora.server.inputs import base_parts, device_of, digest_of, evaluated_parts

if TYPE_CHECKING:
    from fedlora.server.federated_run import FederatedRun

FILE = "untrained-{}.json"
TAKEN_FROM = "taken_from"
"""In ``before.json``: the run that measured it, where that is another one."""


def untrained(run: FederatedRun, evaluator: GlobalEvaluator) -> dict[str, Any]:
    """Records ``whole`` and ``part`` of the test set before round 1, and ``samples`` where the model writes.

    Where another run of the study has measured it the records say which, as `TAKEN_FROM`.

    Args:
        run: at its first round.
        evaluator: of the run.
    """
    shared, found = run.directory.shared, None if run.directory.shared is None else _digest(run)
    file = None if shared is None or found is None else shared / FILE.format(found)
    if file is not None and file.exists():
        try:
            measured = read_sealed(file)
        except ConfigError as error:
            logging.getLogger("fedlora").warning("%s; it is measured again", error)
        else:
            taken = {TAKEN_FROM: measured["by"]}
            return {**measured, "whole": measured["whole"] | taken, "part": measured["part"] | taken}
    whole = evaluator.record(evaluator.whole(run.state))
    writes = run.runtime.model.task.unit == "token" and not run.personal
    measured = {
        "by": run.directory.path.name,
        "samples": evaluator.samples(run.state) if writes else None,
        "whole": whole,
        "part": evaluator.part(run.state),
    }
    if file is not None:
        write_atomic(file, json.dumps(sealed(measured), indent=2) + "\n")
    return measured


def _digest(run: FederatedRun) -> str | None:
    """A digest of all that the figures depend on; None where something of it is not known here."""
    config, runtime, state = run.config, run.runtime, run.state
    device, lora = device_of(config), config.lora
    if device is None or ":" in lora.method:
        return None
    return digest_of({
        "code": code_digest(),
        "computed": [device, config.engine.name, torch.get_num_threads(), platform.node(),
                     platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "base": [base_parts(runtime), [patch.digest() for patch in state.base], repr(config.model),
                 str(getattr(runtime.model.module, "config", ""))],
        "head": [sorted(hashes(runtime.model.initial_head).items()), digest(state.head)],
        "kind": lora.method if lora.method == "lora" else [repr(lora), config.seed],
        "adapters": {module: _effect(adapter) for module, adapter in sorted(state.adapters.items())},
        "data": evaluated_parts(runtime.data),
        "task": [config.task, config.train.dpo_beta],
        "settings": [config.data.evaluate_examples, config.evaluation_precision, run.personal,
                     load_tokenizer(config.model.name).identity],
    })  # fmt: skip


def _effect(adapter: LayerAdapter) -> list[object]:
    """What an adapter adds: nothing, whatever the other factors are, where one of a product is zero."""
    tensors: Mapping[str, torch.Tensor] = adapter.tensors()
    if isinstance(adapter, LoraFactors) and adapter.A0 is None and not all(t.any() for t in tensors.values()):
        return []
    return [adapter.scaling, digest(tensors)]
