"""The strategy of a configuration: its rule, what is settled for each client, the state before round 1."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache, partial
from logging import INFO

from flwr.app import ArrayRecord
from flwr.common.logger import log

from clients.privacy import mechanism_of
from clients.runtime import ClientRuntime
from clients.secure_steps import acting, terms_of
from fedlora.config import RunConfig
from fedlora.core.init_drawn import FROM_BASE, FROM_DATA
from fedlora.core.init_eva import most_varied
from fedlora.core.init_svd import subtract_from_base
from fedlora.core.state import ClientSpec, Template
from fedlora.errors import ConfigError
from fedlora.models.gradient_checkpointing import blocks
from fedlora.secure.peers import Peers
from fedlora.server.evaluator import is_measured
from fedlora.server.exactness import check_parts, mean_is_exact
from fedlora.server.public_data import first_gradients, first_inputs
from fedlora.server.secure import largest_weight, shared_noise
from fedlora.server.validate import clients_measure, configured_screening
from strategies.arriving import ArrivingStrategy
from strategies.buffered import BufferedStrategy
from strategies.flower import FactorStrategy
from strategies.nodes import NodeDirectory
from strategies.replies import KnownExamples
from strategies.rule import Rule
from strategies.sampling import clients_of_round
from strategies.secure import SecureStrategy
from strategies.sums import seen_alone
from strategies.tiered import TieredStrategy


class OwnStrategy(FactorStrategy):
    """The strategy of a fedlora run, which writes the adapter from the state: nobody is given arrays."""

    def arrays(self) -> ArrayRecord:
        return ArrayRecord()


class OwnSecureStrategy(OwnStrategy, SecureStrategy):
    """The same where the server learns sums alone."""


class OwnBufferedStrategy(OwnStrategy, BufferedStrategy):
    """The same where rounds do not wait."""


class OwnArrivingStrategy(OwnStrategy, ArrivingStrategy):
    """The same in real time."""


class OwnTieredStrategy(OwnStrategy, TieredStrategy):
    """The same where each tier has rounds of its own."""


def assemble(
    rule: Rule,
    config: RunConfig,
    runtime: ClientRuntime,
    partitions: Collection[int],
    *,
    simulation: bool,
    packed: bool,
    known_examples: KnownExamples,
    node_directory: NodeDirectory | None = None,
    peers: Peers | None = None,
) -> FactorStrategy:
    """The strategy, with its state before round 1.

    Args:
        rule: of the configuration, checked.
        config: the run.
        runtime: its model and data.
        partitions: those that may take part.
        simulation: clients are this project's own: noise for whole clients may come from the run's seed, and
            nobody is screened unless the configuration says so.
        packed: each record of an instruction travels as one array.
        known_examples: what is known of the partitions here, see `strategies.replies`.
        node_directory: who is who among the nodes, where their keys say so.
        peers: those keys, where nodes sign in secure sums.

    Raises:
        ConfigError: a rank that a layer does not allow, no public examples to start from, or fewer simulated
            clients than each round needs.
    """
    if simulation and config.min_train_nodes > len(partitions):
        raise ConfigError(
            f"min-train-nodes = {config.min_train_nodes}: there are only {len(partitions)} clients"
        )
    ranks = {config.rank_of(p) for p in partitions}
    for rank in sorted(ranks):
        runtime.model.check_rank(rank)
    if config.lora.personal_rank:
        runtime.model.check_rank(config.lora.personal_rank, "lora.personal-rank")
    if config.train.gradient_checkpointing:
        blocks(runtime.model.module)
    privacy, screening = mechanism_of(config), configured_screening(config, rule, simulation=simulation)
    if screening is not None:
        log(INFO, "screening of updates: %s", screening)
    strategy = _kind(config, partitions, known_examples, peers, simulation=simulation)(
        rule,
        fraction_train=config.fraction_train * config.devices.over_selection,
        min_train_nodes=config.min_train_nodes,
        min_available_nodes=config.min_available_nodes,
        seed=config.seed,
        weighted_by_key=privacy.weighted_by_key,
        client_spec=cache(partial(client_spec, config, runtime)),
        partitions=frozenset(partitions),
        max_participations=privacy.max_participations,
        max_update_norm=config.strategy.max_update_norm,
        known_examples=known_examples,
        screening=screening,
        fraction_evaluate=None,
        clients_evaluate=partial(is_measured, config) if clients_measure(config, rule) else _never,
        diagnostics=config.strategy.diagnostics,
        client_dp=privacy.server(seeded=simulation),
        wire_dtype=config.wire_dtype,
        upload=config.upload,
        packed=packed,
        keep_ranks=False,
        node_directory=node_directory,
        max_missed_rounds=0 if simulation else config.max_missed_rounds,
    )
    template = _template(rule, config, runtime, max(ranks))
    if template.adapters is not None and config.lora.method != "lora":
        check_parts(rule, config.lora.method, template.adapters)
        if rule.facts.global_adapter and not mean_is_exact(rule, runtime.model, template.adapters):
            logging.getLogger("fedlora").warning(
                "lora.method = %r: the mean of what %s ships is not the mean of the clients' weights",
                config.lora.method, rule.facts.name,
            )  # fmt: skip
    strategy.begin(template)
    if config.secure.mode == "sums" and strategy.state is not None:
        specs = [client_spec(config, runtime, partition) for partition in partitions]
        signed = None if peers is None else partial(acting, config)
        if why := seen_alone(rule, strategy.state, specs, config.secure.min_clients, signed):
            raise ConfigError(why)
    return strategy


def _kind(
    config: RunConfig, partitions: Collection[int], known_examples: KnownExamples, peers: Peers | None, *,
    simulation: bool,
) -> Callable[..., FactorStrategy]:  # fmt: skip
    """Strategy whose rounds wait, one whose rounds do not, or one that sees sums alone.

    Raises:
        ConfigError: fewer clients than are to be at work, or than a sum may be of.
    """
    if config.secure.mode == "sums":
        return partial(
            OwnSecureStrategy,
            terms=terms_of(config),
            largest_change=config.secure.largest_change,
            max_weight=largest_weight(config, partitions, known_examples),
            shared_noise=shared_noise(config, len(partitions)),
            sketch_size=config.secure.sketch_size,
            timeout=config.round_timeout,
            peers=peers,
            acting=partial(acting, config),
        )
    devices = config.devices
    if devices.waits:
        return OwnStrategy
    late = {"max_staleness": devices.max_staleness, "discount": devices.staleness == "sqrt"}
    usual = clients_of_round(config.fraction_train, len(partitions), devices.buffer_size)
    key, wanted = ("tiers", devices.tiers) if devices.tiers else ("in-flight", devices.in_flight or usual)
    if wanted > len(partitions):
        raise ConfigError(f"devices.{key} = {wanted}: only {len(partitions)} clients take part")
    if devices.tiers:
        return partial(OwnTieredStrategy, tiers=wanted, **late)
    buffered = OwnBufferedStrategy if simulation else OwnArrivingStrategy
    return partial(buffered, in_flight=wanted, buffer_size=devices.buffer_size, **late)


def _never(server_round: int) -> bool:
    return False


def client_spec(config: RunConfig, runtime: ClientRuntime, partition_id: int) -> ClientSpec:
    """Settings of one client: rank, scaling and modules of its group, or everybody's."""
    rank = config.rank_of(partition_id)
    group = config.group_of(partition_id)
    modules = None
    if group is not None and group.target_modules is not None:
        modules = frozenset(runtime.modules[group.target_modules])
    return ClientSpec(
        partition_id=partition_id,
        rank=rank,
        scaling=config.lora.scaling(rank, config.alpha_of(partition_id)),
        modules=modules,
    )


def _template(rule: Rule, config: RunConfig, runtime: ClientRuntime, rank: int) -> Template:
    share_head = config.model.head == "train"
    template = runtime.model.template(rank, config.lora.scaling(rank), share_head=share_head)
    if config.model.adapter:
        from fedlora.server.warm_start import warm_start  # and PEFT

        template = warm_start(template, config, runtime)
    if rule.init_a in FROM_BASE:
        template = subtract_from_base(template, runtime.model.base.pristine, rule.init_a)
    if rule.init_a in FROM_DATA:
        template = _from_data(template, rule.init_a, config, runtime)
    if rule.gradient_examples:
        gradients = first_gradients(runtime, config, rule.gradient_examples)
        template = replace(template, gradients=gradients)
    if rule.base_weights:
        template = replace(template, weight=runtime.model.base.pristine)
    return template


def _from_data(template: Template, kind: str, config: RunConfig, runtime: ClientRuntime) -> Template:
    number = config.strategy.init_examples
    if kind == "eva":
        return replace(template, adapters=most_varied(template, first_inputs(runtime, config, number)))
    return subtract_from_base(template, first_gradients(runtime, config, number).__getitem__, kind)
