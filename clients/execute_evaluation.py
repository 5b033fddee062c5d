"""Executes an instruction to evaluate: exactly, or with noise where the owner of a node wants it.

With noise, at the epsilon that the owner set and on the node's ledger, are released the share of hits and the
mean loss, each example's loss being cut off at `LARGEST_LOSS` and its hits being a share of its own units, by
`fedlora.privacy.noisy_means`. All test examples are taken: which ones a subset has would follow their number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from clients.evaluation import Evaluation, evaluate
from clients.execute import ACCURACY_IN, EXAMPLES_IN, NUM_EXAMPLES, NUM_UNITS, set_up
from clients.ledger_ref import LedgerRef, example_of, ledger_of, ledger_ref_of
from clients.node import Node
from clients.node_settings import EvaluationNoise
from clients.personal import GLOBAL_ACCURACY, evaluate_own, may_tell
from clients.runtime import ClientRuntime
from clients.training.batches import Indices
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.data.examples import evaluation_subset
from fedlora.errors import ConfigError
from fedlora.prepared.cache import Prepared
from fedlora.privacy.noisy_means import noisy_means
from fedlora.privacy.spending import EvaluationRelease
from fedlora.privacy.types import NeighboringRelation, PrivacySpent

LARGEST_LOSS = 5.0
"""Nats; an example's mean loss beyond it counts as that."""


def evaluate_instruction(
    runtime: ClientRuntime, instruction: wire.TrainInstruction, config: RunConfig, node: Node
) -> wire.Reply:
    """The reply to an instruction to evaluate: this client's model on the test examples of its own domains.

    The fixed subset of them, and all of them after the last round.
    """
    second = config.lora.personal_rank > 0
    if second and not may_tell(config):
        raise ConfigError("privacy.release-metrics = false: what a second adapter reaches is outside epsilon")
    if second and not node.tells_second:
        raise ConfigError(
            f"lora.personal-rank = {config.lora.personal_rank}: what a second adapter reaches leaves this "
            "node only where its owner sets release-metrics and no evaluation-epsilon"
        )
    resolved = set_up(runtime, instruction, config, node, after_round=True)
    if isinstance(resolved, wire.Reply):
        return resolved
    if node.before_evaluation is not None:
        node.before_evaluation()
    own_results = partial(
        evaluate_own, runtime, resolved, config, node.partition_id, instruction.server_round + 1
    )
    if node.evaluation_noise is not None:
        return noisy_evaluation(
            runtime,
            config,
            own_results,
            ledger_ref_of(config, instruction, node),
            node.evaluation_noise,
            partition_id=node.partition_id,
            server_round=instruction.server_round,
            holds=instruction.needs.digests,
        )
    last = instruction.server_round == config.num_server_rounds
    chosen = evaluation_subset(runtime.data.test, 0 if last else config.data.evaluate_examples)
    own = np.intersect1d(chosen, own_test_indices(runtime.data, node.partition_id))
    outcome = own_results(own)
    metrics = {NUM_EXAMPLES: float(outcome.num_examples), "accuracy": outcome.accuracy, "loss": outcome.loss}
    if second:
        runtime.model.load(resolved.adapters, resolved.head)
        given = runtime.model, runtime.data.test, own, runtime.data.pad_token_id
        beside = evaluate(*given, precision=config.evaluation_precision)
        metrics[GLOBAL_ACCURACY] = beside.accuracy
    if not runtime.model.task.labelled:
        metrics[NUM_UNITS] = float(outcome.num_units)
    for domain, results in outcome.by_domain().items():
        metrics[f"{ACCURACY_IN}{domain}"] = results.accuracy
        metrics[f"{EXAMPLES_IN}{domain}"] = float(results.num_units)
    return wire.Reply(status=wire.OK, metrics=metrics, holds=instruction.needs.digests)


def own_test_indices(data: Prepared, partition_id: int) -> Indices:
    """The test examples of the domains that a client holds; all of them where there are no domains."""
    if not data.domain_names:
        return np.arange(len(data.test))
    held = np.unique(data.train.domains[data.indices(partition_id)])
    return np.flatnonzero(np.isin(data.test.domains, held))


def noisy_evaluation(
    runtime: ClientRuntime,
    config: RunConfig,
    own_results: Callable[[Indices], Evaluation],
    ledger_ref: LedgerRef,
    noise: EvaluationNoise,
    *,
    partition_id: int,
    server_round: int,
    holds: tuple[str, ...],
) -> wire.Reply:
    """The reply of an evaluation on all test examples of the node's own.

    Args:
        runtime: the data.
        config: the run.
        own_results: of test examples, by the client's model.
        ledger_ref: where the node keeps its ledger, and for which run.
        noise: of the node.
        partition_id: whose evaluation.
        server_round: names it.
        holds: digests for the reply.

    Raises:
        BudgetExceeded: what is set aside for evaluations is spent.
        LedgerRefused: the ledger cannot be relied upon.
        ConfigError: there is no test example where their number is public.
    """
    count = len(runtime.data.test)
    if not count and not noise.count_hidden:
        raise ConfigError("test-fraction = 0.0: there is no example to evaluate on")
    relation = (
        NeighboringRelation.ADD_OR_REMOVE_ONE if noise.count_hidden else NeighboringRelation.ZERO_OUT_ONE
    )
    standing = ledger_of(ledger_ref.directory, config, runtime.data, partition_id).reserve_evaluation(
        EvaluationRelease(
            run_key=ledger_ref.run_key,
            server_round=server_round,
            partition_id=partition_id,
            epsilon=noise.epsilon,
            neighboring_relation=relation,
            cut=example_of(config, runtime.data),
        ),
        known_head=ledger_ref.known_head,
        max_epsilon=ledger_ref.max_epsilon,
        set_aside=ledger_ref.set_aside,
    )
    scores = np.zeros((0, 2))
    if count:
        outcome = own_results(np.arange(count))
        scores = np.stack([outcome.right / outcome.units, outcome.losses / LARGEST_LOSS], axis=1)
    (accuracy, loss), examples = noisy_means(scores, noise.epsilon, count_hidden=noise.count_hidden)
    return wire.Reply(
        status=wire.OK,
        metrics={NUM_EXAMPLES: examples, "accuracy": accuracy, "loss": LARGEST_LOSS * loss},
        holds=holds,
        privacy=PrivacySpent.of(standing).told(count=False),
    )
