"""The strategy of a configuration: its rule, what is settled for each client, the state before round 1."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

from flwr.app import ArrayRecord

from clients.resident import Resident
from fedlora.client_level import client_mechanism
from fedlora.config import RunConfig
from fedlora.initial import FROM_BASE, FROM_DATA
from fedlora.models.from_base import taken_out
from fedlora.models.from_inputs import most_varied
from fedlora.models.recomputed import blocks
from fedlora.public import first_gradients, first_inputs
from fedlora.updates import ClientSpec, Template
from strategies.courier import ClientSettings
from strategies.flower import FactorStrategy
from strategies.rule import Rule


class OwnStrategy(FactorStrategy):
    """The strategy of a fedlora run, which writes the adapter from the state: nobody is given arrays."""

    def arrays(self) -> ArrayRecord:
        return ArrayRecord()


def assemble(
    rule: Rule,
    config: RunConfig,
    worker: Resident,
    partitions: Collection[int],
    *,
    clients_evaluate: Callable[[int], bool],
    seeded: bool,
    packed: bool,
    client_settings: ClientSettings,
) -> FactorStrategy:
    """The strategy, with its state before round 1.

    Args:
        rule: of the configuration, checked.
        config: the run.
        worker: its model and data.
        partitions: those that may take part.
        clients_evaluate: after which rounds clients evaluate.
        seeded: noise for whole clients may come from the run's seed.
        packed: each record of an order travels as one array.
        client_settings: partition -> what only its own orders say.

    Raises:
        ConfigError: a rank that a layer does not allow, or no public examples to start from.
    """
    ranks = {config.rank_of(p) for p in partitions}
    for rank in sorted(ranks):
        worker.model.check_rank(rank)
    if config.train.gradient_checkpointing:
        blocks(worker.model.module)
    strategy = OwnStrategy(
        rule,
        fraction_train=config.fraction_train,
        min_train_nodes=config.min_train_nodes,
        min_available_nodes=config.min_available_nodes,
        seed=config.seed,
        weighted_by_key="num-examples" if config.privacy.mode == "none" else None,
        client_spec=partial(client_spec, config, worker),
        partitions=frozenset(partitions),
        max_participations=0 if config.privacy.mode == "none" else config.privacy.max_participations,
        max_update_norm=config.strategy.max_update_norm,
        fraction_evaluate=None,
        clients_evaluate=clients_evaluate,
        diagnostics=config.strategy.diagnostics,
        client_dp=client_mechanism(config, seeded=seeded),
        wire_dtype=config.wire_dtype,
        packed=packed,
        keep_ranks=False,
        client_settings=client_settings,
    )
    strategy.state = strategy.begin(_template(rule, config, worker, max(ranks)))
    return strategy


def client_spec(config: RunConfig, worker: Resident, partition_id: int) -> ClientSpec:
    """What is settled for one client: rank, scaling and modules of its group, or everybody's."""
    rank = config.rank_of(partition_id)
    group = config.group_of(partition_id)
    modules = None
    if group is not None and group.target_modules is not None:
        modules = frozenset(worker.modules[group.target_modules])
    return ClientSpec(
        partition_id=partition_id,
        rank=rank,
        scaling=config.lora.scaling(rank, config.alpha_of(partition_id)),
        modules=modules,
    )


def _template(rule: Rule, config: RunConfig, worker: Resident, rank: int) -> Template:
    share_head = config.model.head == "train"
    template = worker.model.template(rank, config.lora.scaling(rank), share_head=share_head)
    if rule.init_a in FROM_BASE:
        template = taken_out(template, worker.model.base.pristine, rule.init_a)
    if rule.init_a in FROM_DATA:
        template = _from_data(template, rule.init_a, config, worker)
    if rule.gradient_examples:
        gradients = first_gradients(worker, config, rule.gradient_examples)
        template = replace(template, gradients=gradients)
    return template


def _from_data(template: Template, kind: str, config: RunConfig, worker: Resident) -> Template:
    number = config.strategy.init_examples
    if kind == "eva":
        return replace(template, adapters=most_varied(template, first_inputs(worker, config, number)))
    return taken_out(template, first_gradients(worker, config, number).__getitem__, kind)
