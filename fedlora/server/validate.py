"""Validation of a configuration as a whole, before anything is started."""

from __future__ import annotations

from collections.abc import Collection

from clients.personal import may_tell
from clients.privacy import mechanism_of
from clients.training.optimizers.local import LocalOptimizer
from clients.training.optimizers.registry import check_optimizer, optimizer_type
from fedlora.adapters import check_kind
from fedlora.config import DevicesConfig, RunConfig, StrategyConfig
from fedlora.core.init_drawn import FROM_DATA, TAKEN_OUT
from fedlora.data.chat.template import check_chat
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.best import check_metric
from fedlora.server.personal import check_second
from fedlora.server.secure import check_secure
from fedlora.server.tracking import check_tracking
from fedlora.server.validate_passes import check_passes
from fedlora.tasks import task_named
from fedlora.wire import codec_named
from strategies.allocation import make_allocation
from strategies.buffered import check_buffer
from strategies.late import check_late
from strategies.registry import RULES, make_rule
from strategies.robust import make_center
from strategies.rule import Rule
from strategies.screening import Screening
from strategies.server_optimizer import ServerOptimizer
from strategies.uploads import checked_upload, codec_of

UNEQUAL_STEPS = 2.5
"""Times that honest updates lie further apart where steps follow the number of examples, or groups differ: in
rounds of one epoch over Dirichlet(0.1) sizes up to 4.4 medians, with equal numbers of steps up to 1.5."""


def check(config: RunConfig) -> Rule:
    """The rule of a configuration, after refusing combinations that cannot work.

    Raises:
        NotApplicable: what the rule, the task or a mode of privacy excludes by its nature, such as mixed
            ranks for a rule that cannot take them.
        ConfigError: an unknown strategy or option, or a value that cannot work.
    """
    check_tracking(config.tracking.tool)
    check_kind(config.lora)
    rule = configured_rule(config.strategy)
    configured_screening(config, rule, simulation=True)
    codec = codec_of(config.upload, rule, config.wire_dtype)
    checked_upload(codec, rule, client_dp=config.privacy.mode == "client")
    check_task(config, rule)
    if rule.allocation.name != "all" and any(group.target_modules is not None for group in config.groups):
        raise ConfigError(
            f"strategy.allocation = {rule.allocation.name!r}: a client with target-modules of its own "
            "(client-groups) could have nothing to train"
        )
    if config.lora.method != "lora":
        check_other_kind(config, rule)
    ranks = set(config.lora.rank_list) | {g.rank for g in config.groups if g.rank is not None}
    if len(ranks) > 1 and not rule.facts.mixed_ranks:
        able = ", ".join(name for name, r in RULES.items() if r.facts.mixed_ranks)
        raise NotApplicable(
            f"lora.ranks: {rule.facts.name} needs equal ranks, not {sorted(ranks)} (mixed: {able})"
        )
    if len(ranks) > 1 and rule.init_a in TAKEN_OUT:
        raise NotApplicable(
            f"strategy.init-a = {rule.init_a!r}: needs equal ranks, not {sorted(ranks)}, "
            "a client of lower rank would lack a part of the base weight"
        )
    if config.model.adapter:
        check_warm_start(config, rule, ranks)
    if config.lora.personal_rank or config.lora.personal_weights != "one":
        check_second(config, rule, kept(config, rule))
    mechanism_of(config).check(rule, kept(config, rule))
    check_metric(config, kept(config, rule))
    if not config.devices.waits:
        check_asynchronous(config, rule)
    if config.secure.mode == "sums":
        check_secure(config, rule)
    if config.model.quantization != "none":
        check_quantised(config, rule)
    check_passes(config, rule)
    if rule.gradient_examples and not config.data.public:
        raise ConfigError(
            f"data.public = '': {rule.facts.name} starts from a gradient on public examples, name some"
        )
    if rule.init_a in FROM_DATA and not config.data.public:
        raise ConfigError(
            f"data.public = '': strategy.init-a = {rule.init_a!r} looks at public examples, name some"
        )
    if not rule.facts.trained and config.model.head == "freeze":
        raise NotApplicable(f"model.head = 'freeze': {rule.facts.name} would train nothing")
    check_optimizer(
        config.train,
        trained={rule.trained(number) for number in range(1, config.num_server_rounds + 1)},
        head=config.model.head != "freeze" and task_named(config.task).labelled,
        blocks=rule.core_in_blocks,
    )
    return rule


def check_warm_start(config: RunConfig, rule: Rule, ranks: Collection[int]) -> None:
    """Refuse an adapter to start from where the start is another, or not the same for all.

    Raises:
        NotApplicable: another kind of adapter, a start of its own, or clients of different ranks.
    """
    key = f"model.adapter = {config.model.adapter!r}"
    if config.lora.method != "lora":
        raise NotApplicable(f"{key}: is of lora, the run has lora.method = {config.lora.method!r}")
    if rule.init_a != "kaiming":
        raise NotApplicable(f"{key}: brings its A, leave strategy.init-a = {rule.init_a!r} out")
    if rule.gradient_examples:
        raise NotApplicable(f"{key}: {rule.facts.name} starts from a gradient on public examples here")
    if rule.base_weights:
        raise NotApplicable(f"{key}: {rule.facts.name} starts from the base weights here")
    if len(ranks) > 1:
        raise NotApplicable(
            f"{key}: needs equal ranks, not {sorted(ranks)}, a client of lower rank would lack a part of it"
        )


def check_asynchronous(config: RunConfig, rule: Rule) -> None:
    """Refuse what excludes rounds that do not wait.

    Raises:
        NotApplicable: the rule, its allocation, client-level privacy, or screening.
        ConfigError: a buffer that never fills.
    """
    devices, size = config.devices, config.devices.buffer_size
    key = f"devices.buffer-size = {size}" if size else f"devices.tiers = {devices.tiers}"
    if rule.allocation.name != "all" or config.privacy.mode == "client" or kept(config, rule):
        what = "strategy.allocation" if rule.allocation.name != "all" else "privacy.mode = 'client'"
        what = "what clients keep to themselves" if kept(config, rule) else what
        raise NotApplicable(f"{key}: {what} needs rounds that wait")
    if config.strategy.screening == "on":
        raise NotApplicable(f"{key}: strategy.screening = 'on' needs rounds that wait")
    check_late(rule, key)
    if not size:
        return
    check_buffer(devices.in_flight or size, size)
    if config.min_train_nodes > size:
        raise ConfigError(f"min-train-nodes = {config.min_train_nodes}: devices.buffer-size is {size}")


def check_time(devices: DevicesConfig, *, simulated: bool) -> None:
    """Refuse simulated time where it is real, and rounds of a buffer where there is no time at all.

    Raises:
        ConfigError: one of these.
    """
    if devices.timed and not simulated:
        raise ConfigError("devices: time is simulated by `fedlora run` and `compare`, here it is real")
    if devices.buffer_size and simulated and not devices.timed:
        key = f"devices.buffer-size = {devices.buffer_size}"
        raise ConfigError(f"{key}: means nothing without devices.profiles or devices.trace in a simulation")


def check_task(config: RunConfig, rule: Rule) -> None:
    """Refuse what the task excludes; where it trains no head, ``train`` and ``freeze`` mean the same.

    Raises:
        NotApplicable: a rule that would train nothing.
        ConfigError: no such task, columns that it cannot read, or a head where the task has none.
    """
    task = task_named(config.task)
    task.columns(config.data)
    check_chat(config)
    writes = task.network == "language-model"
    if config.generate_every and (not writes or kept(config, rule)):
        why = "clients keep a part of the model" if writes else f"{task.name} writes no text"
        raise NotApplicable(f"generate-every = {config.generate_every}: {why}, must be 0")
    if not task.labelled and config.model.head == "local":
        raise ConfigError(f"model.head = 'local': task {task.name} trains no head, accepted is 'train'")
    if not task.labelled and not rule.facts.trained:
        raise NotApplicable(
            f"strategy.name = {rule.facts.name!r}: task {task.name} has no head, so nothing trains"
        )


def check_other_kind(config: RunConfig, rule: Rule) -> None:
    """Refuse what only LoRA has.

    Raises:
        NotApplicable: a rule that reads products of A and B, a start of A, or clients of their own ranks.
        ConfigError: a base in 4 bits, or a step size of B alone.
    """
    key = f"lora.method = {config.lora.method!r}"
    if not rule.facts.any_kind:
        able = ", ".join(name for name, r in RULES.items() if r.facts.any_kind)
        raise NotApplicable(
            f"{key}: {rule.facts.name} reads the product of A and B, which lora alone has (able: {able})"
        )
    if rule.init_a != "kaiming":
        raise NotApplicable(f"{key}: strategy.init-a = {rule.init_a!r} makes the A of lora, leave it out")
    if any(g.rank is not None or g.alpha is not None for g in config.groups):
        raise NotApplicable(f"{key}: client-groups: rank and alpha of a group are of lora alone")
    if rule.allocation.name not in ("all", "random-layers"):
        raise NotApplicable(
            f"{key}: strategy.allocation = {rule.allocation.name!r} reads the product of A and B"
        )
    if config.max_rank:
        raise NotApplicable(f"{key}: max-rank = {config.max_rank}: a rank to cut is of lora alone, must be 0")
    if config.model.quantization != "none":
        raise ConfigError(f"{key}: model.quantization = {config.model.quantization!r} is for lora alone")
    if config.train.loraplus_lr_ratio != 1:
        ratio = config.train.loraplus_lr_ratio
        raise ConfigError(f"{key}: train.loraplus-lr-ratio = {ratio}: is of lora's B, must be 1")
    if issubclass(optimizer_type(config.train.optimizer), LocalOptimizer):
        raise ConfigError(f"{key}: train.optimizer = {config.train.optimizer!r} moves the A and B of lora")


def check_quantised(config: RunConfig, rule: Rule) -> None:
    """Refuse what reads or moves the weights of a base that is held in 4 bits.

    Raises:
        ConfigError: a strategy or a start that does.
    """
    key = f"model.quantization = {config.model.quantization!r}"
    if rule.facts.updates_base:
        able = ", ".join(name for name, r in RULES.items() if not r.facts.updates_base)
        raise ConfigError(
            f"{key}: {rule.facts.name} adds to the base, which 4 bits cannot hold (able: {able})"
        )
    if rule.init_a in TAKEN_OUT:
        raise ConfigError(
            f"{key}: strategy.init-a = {rule.init_a!r} adds to the base, which 4 bits cannot hold"
        )
    if rule.gradient_examples:
        raise ConfigError(f"{key}: {rule.facts.name} starts from a gradient of weights, which are packed")
    if rule.base_weights:
        raise ConfigError(f"{key}: {rule.facts.name} starts from the weights themselves, which are packed")


def kept(config: RunConfig, rule: Rule) -> str:
    """Parts of clients' models that are their own, so that only they can measure these; else empty."""
    if config.model.head == "local":
        return "model.head = 'local'"
    part = "a personal factor" if rule.facts.personal else "an adapter of their own"
    return f"{part} of {rule.facts.name}" if rule.facts.own_models else ""


def clients_measure(config: RunConfig, rule: Rule) -> bool:
    """Whether clients evaluate models of their own, and may tell what they find."""
    return bool(kept(config, rule)) or (config.lora.personal_rank > 0 and may_tell(config))


def configured_screening(config: RunConfig, rule: Rule, *, simulation: bool) -> Screening | None:
    """The bounds that one client's weight and way have beside the others'; None where there are none.

    Raises:
        ConfigError: a bound that is neither 0 nor at least 1, or bounds under client-level privacy.
    """
    strategy, client_level = config.strategy, config.privacy.mode == "client"
    codec = codec_named(codec_of(config.upload, rule, config.wire_dtype))
    unequal = config.train.local_epochs > 0 or bool(config.groups)
    unequal |= codec.feedback  # then an update tells what earlier ones left out
    bounds = Screening(
        largest_share=strategy.largest_share,
        max_relative_norm=strategy.max_relative_norm * (UNEQUAL_STEPS if unequal else 1.0),
    )
    if strategy.screening == "on" and client_level:
        raise NotApplicable(
            "strategy.screening = 'on': leaves a client out by what others sent, which the noise of "
            "privacy.mode = 'client' does not cover; there updates are clipped and weigh alike"
        )
    blind = client_level or config.secure.mode == "sums"
    wanted = not (simulation or blind) if strategy.screening == "auto" else strategy.screening == "on"
    return bounds if wanted else None


def configured_rule(config: StrategyConfig) -> Rule:
    """The rule of a ``[strategy]`` section, composed with its robust centre and its server optimiser."""
    return make_rule(
        config.name,
        config.option_dict,
        allocation=make_allocation(config.allocation, config.allocation_dict),
        center=make_center(
            config.robust,
            trim_fraction=config.trim_fraction,
            malicious=config.krum_malicious,
            chosen=config.krum_chosen,
        ),
        optimizer=ServerOptimizer(
            name=config.server_optimizer,
            learning_rate=config.server_learning_rate,
            beta_1=config.server_beta_1,
            beta_2=config.server_beta_2,
            tau=config.server_tau,
        ),
    )
