"""A second LoRA adapter of each client's own, beside the global one: trained at the client, and never sent.

With W the round's base, B A the global adapter as the client received it and P Q its own, of rank
``lora.personal-rank``, a client's own model is

    y = W x + s B A x + s_p P Q x

First the client does what the round asks, in which P Q takes no part. Then, with B A and the head held as
they were received, it trains P and Q: as many steps of the same optimiser, from streams of their own, without
noise. So what is sent is bit for bit what a run without second adapters sends, and what epsilon says of it
holds. A shared gradient that had seen P Q would not be covered by its own noise: P Q depends on all examples.

This is the iterative form of FedDPA, Yang et al., NeurIPS 2024 (arXiv 2403.19211, of which the abstract and
the released code were read), with the sum of both adapters in place of its weights w and 1 - w; those are
``lora.personal-weights = "input"``, see `clients.by_input`. Of SDFLoRA
(arXiv 2601.11219, noise on the shared module alone), FDLoRA and FedALT no primary text was read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from clients.by_input import IN_TRAINING, input_weights, weighed
from clients.evaluation import Evaluation, evaluate
from clients.runtime import ClientRuntime
from clients.store import ClientStore, ResolvedInstruction
from clients.training.batched.members import Member
from clients.training.batches import Indices, num_steps
from clients.training.pass_memory import with_passes
from clients.training.schedule import Stage
from clients.training.train import train_local
from fedlora import wire
from fedlora.config import RunConfig, TrainConfig
from fedlora.core.adapters import Adapters, lora_set
from fedlora.core.factors import PLAIN, AdapterSet
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.seeding import derive
from fedlora.models.packed_linear import packed_base

GLOBAL_ACCURACY = "accuracy-of-global"
"""Metric of the global model, beside those of a client's own."""
SECOND = "second"
"""Name of what is kept, in PEFT's spelling."""


def second_adapter(
    runtime: ClientRuntime, config: RunConfig, store: ClientStore, partition_id: int, before_round: int
) -> AdapterSet:
    """P and Q as the last round before left them; at first P = 0, and Q drawn from the client's own seed."""
    scaling = config.lora.scaling(config.lora.personal_rank)
    kept = store.personal(partition_id, SECOND, before_round)
    if kept is not None:
        return wire.from_peft(kept).lora(scaling)
    seed = derive(config.seed, "second", partition_id)
    return fresh_adapters(runtime.model.modules, config.lora.personal_rank, scaling, seed)


def held(adapters: Adapters) -> AdapterSet:
    """A global adapter as it stands beside a second one, without a core."""
    return {module: factors.folded() for module, factors in lora_set(adapters).items()}


def in_training(config: RunConfig, adapters: AdapterSet) -> AdapterSet:
    """Either of the two adapters at the weight that it has while the second one is trained."""
    weight = IN_TRAINING if config.lora.personal_weights == "input" else 1.0
    return {m: replace(factors, scaling=weight * factors.scaling) for m, factors in adapters.items()}


def train_second(
    runtime: ClientRuntime, resolved: ResolvedInstruction, config: RunConfig, partition_id: int,
    server_round: int,
) -> None:  # fmt: skip
    """Train a client's second adapter beside what it received, and keep it.

    Args:
        runtime: its model, whose base is the round's, and data.
        resolved: what it received.
        config: the run.
        partition_id: whose.
        server_round: from 1.
    """
    model, data, store = runtime.model, runtime.data, resolved.store
    own = in_training(config, second_adapter(runtime, config, store, partition_id, server_round))
    beside = in_training(config, held(resolved.adapters))
    model.load(own, resolved.head, trained=PLAIN, dropout=config.lora.dropout, beside=beside)
    given = data.train, data.indices(partition_id), data.pad_token_id
    train = with_passes(model, *given, own_steps(config.train_of(partition_id)))
    with packed_base(model, model.precision):
        result = train_local(
            model, *given, train,
            local_steps=config.local_steps_of(partition_id),
            seed=derive(config.seed, "second", server_round, partition_id),
            stage=Stage(server_round, config.num_server_rounds),
        )  # fmt: skip
    keep_second(store, partition_id, server_round, result.adapters)


def may_tell(config: RunConfig) -> bool:
    """Whether what second adapters reach may leave their clients: it is outside epsilon."""
    return config.privacy.mode == "none" or config.privacy.release_metrics


def evaluate_own(
    runtime: ClientRuntime,
    resolved: ResolvedInstruction,
    config: RunConfig,
    partition_id: int,
    before_round: int,
    indices: Indices,
) -> Evaluation:
    """Test results of a client's own model: the global adapter, beside it a second one where there are such.

    Args:
        runtime: its model, whose base is the round's, and data.
        resolved: what it received.
        config: the run.
        partition_id: whose.
        before_round: the round after the one that made its second adapter.
        indices: test examples.
    """
    model, test = runtime.model, runtime.data.test
    given = model, test, indices, runtime.data.pad_token_id
    run = partial(evaluate, *given, precision=config.evaluation_precision)
    if not config.lora.personal_rank:
        model.load(resolved.adapters, resolved.head)
        return run()
    own = second_adapter(runtime, config, resolved.store, partition_id, before_round)
    weights = None
    if config.lora.personal_weights == "input":
        model.load(own, resolved.head)
        weights = input_weights(runtime, config, partition_id, test, indices)
    model.load(own, resolved.head, beside=held(resolved.adapters))
    return run(around=lambda places: weighed(model, None if weights is None else weights[places]))


def second_member(
    runtime: ClientRuntime,
    resolved: ResolvedInstruction,
    config: RunConfig,
    member: Member,
    partition_id: int,
    server_round: int,
) -> Member:
    """As `train_second`, the member of a cohort that has done its part of the round."""
    train = own_steps(config.train_of(partition_id))
    return replace(
        member,
        adapters=in_training(
            config, second_adapter(runtime, config, resolved.store, partition_id, server_round)
        ),
        trained=PLAIN,
        modules=frozenset(runtime.model.modules),
        train_head=False,
        steps=num_steps(train, len(member.indices), config.local_steps_of(partition_id)),
        seed=derive(config.seed, "second", server_round, partition_id),
        tail=None,
        control={},
        beside=in_training(config, held(resolved.adapters)),
        mechanism=None,
        sample_rate=None,
        canaries=None,
    )


def own_steps(train: TrainConfig) -> TrainConfig:
    """The settings of a second adapter's steps: the round's, without what binds a client to the others."""
    return replace(train, proximal_mu=0.0, nested_ranks=False, control_variates=False)


def keep_second(store: ClientStore, partition_id: int, server_round: int, adapters: Adapters) -> None:
    """Store P and Q as they are after a round."""
    store.keep_personal(partition_id, SECOND, server_round, wire.to_peft(adapters, {}))
