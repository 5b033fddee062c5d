"""``fedlora forget``: a run without one of its clients, and whether the model still gives that client away.

Exact by construction: the others' rounds are trained anew, from the beginning, so that nothing of the client
is in the new model (retraining, what Bourtoule et al., "Machine Unlearning", S&P 2021, measure others by).
Subtracting a client's own terms from a stack of products, as a rule like FLoRA would allow, leaves what the
others learned from its rounds; it is not offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clients.evaluation import Evaluation, evaluate
from fedlora.audit.membership import Measured, auc
from fedlora.config import RunConfig, read_config
from fedlora.data.targets import REGRESSION
from fedlora.deployment.operator.layout import LOG
from fedlora.errors import ConfigError
from fedlora.models.export import load_adapter
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.server.results import CONFIG, RESULT, read_result, read_rounds
from fedlora.simulation.simulate import simulate
from fedlora.tasks import task_named


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a global model shows of the client's training examples.

    Attributes:
        accuracy, loss: on them; a regression has no accuracy.
        test_accuracy, test_loss: on the run's test examples.
        auc: of an attacker who says that those with the lower loss were trained on; 0.5 is a coin.
    """

    accuracy: float | None
    loss: float
    test_accuracy: float | None
    test_loss: float
    auc: Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """Outcome of forgetting one client.

    Attributes:
        partition_id: of the client.
        rounds: those that it took part in, which are trained without it.
        examples: its training examples.
        before, after: what the two models show of it.
        influence: probability that one of its examples lost more by the forgetting than a test example, 0.5
            is a coin; what the model knew of these examples and of data like them is one here.
    """

    partition_id: int
    rounds: list[int]
    examples: int
    before: Seen
    after: Seen
    influence: Measured

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def forget(
    run: Path, partition_id: int, out: Path, progress: Callable[[dict[str, Any]], None] | None = None
) -> Forgotten:
    """Train a finished run's rounds anew without one client, and measure both models on its examples.

    Args:
        run: directory of a finished simulation.
        partition_id: of the client.
        out: directory of the new run; empty or absent.
        progress: told about each round.

    Raises:
        ConfigError: no finished run, one without a global adapter, whose data are elsewhere, or in which the
            client took no part.
        RunFailed: the new run stopped.
    """
    config = read_config(run / CONFIG) if (run / RESULT).is_file() else None
    if config is None:
        raise ConfigError(f"{run}: no finished run, there is no {RESULT} in it")
    if (run / LOG).exists():
        raise ConfigError(
            f"{run}: ran over a federation, whose data are at its nodes; run anew without the node"
        )
    if "adapter" not in read_result(run):
        raise ConfigError(f"{run}: it has no global adapter, what a client keeps is forgotten with its state")
    rounds = [r["round"] for r in read_rounds(run) if partition_id in r.get("participants", ())]
    prepared = open_prepared(prepare(config))
    everyone = config.partition_list or range(prepared.num_partitions)
    if not rounds:
        raise ConfigError(f"--partition {partition_id}: took part in no round of {run}")
    others = [p for p in everyone if p != partition_id]
    if not others:
        raise ConfigError(f"--partition {partition_id}: nobody else takes part in {run}")
    simulate(replace(config, partitions=",".join(map(str, others)), output_dir=""), out, callback=progress)
    hits = task_named(config.task).problem_type != REGRESSION
    old, new = (_losses(path, config, prepared, partition_id) for path in (run, out))
    return Forgotten(
        partition_id=partition_id,
        rounds=rounds,
        examples=old[0].num_examples,
        before=_seen(*old, hits),
        after=_seen(*new, hits),
        influence=auc(new[0].losses - old[0].losses, new[1].losses - old[1].losses),
    )


def _losses(
    run: Path, config: RunConfig, prepared: Prepared, partition_id: int
) -> tuple[Evaluation, Evaluation]:
    """A run's global model on the client's training examples, and on the test examples."""
    (model, _), task, pad = load_adapter(run / "adapter"), task_named(config.task), prepared.pad_token_id
    everything = np.arange(len(prepared.test))
    return (
        evaluate(model, prepared.train, prepared.indices(partition_id), pad, task=task),
        evaluate(model, prepared.test, everything, pad, task=task),
    )


def _seen(own: Evaluation, test: Evaluation, hits: bool) -> Seen:
    return Seen(
        accuracy=own.accuracy if hits else None,
        loss=own.loss,
        test_accuracy=test.accuracy if hits else None,
        test_loss=test.loss,
        auc=auc(-own.losses, -test.losses),
    )
