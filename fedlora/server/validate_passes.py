"""Validation of how a step is computed: in parts, packed, of some factors, with blocks computed again."""

from __future__ import annotations

import warnings

from clients.training.optimizers.local import LocalOptimizer
from clients.training.optimizers.registry import optimizer_type
from fedlora.config import RunConfig, TrainConfig
from fedlora.config.section import kebab
from fedlora.core.factors import PLAIN
from fedlora.core.init_drawn import TAKEN_OUT
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.validate_forward import check_forward
from fedlora.tasks import task_named
from strategies.registry import RULES
from strategies.rule import Rule
from strategies.streaming import streams


def check_passes(config: RunConfig, rule: Rule) -> None:
    """Refuse blocks computed again, steps in parts and packed rows where a step would not be what it was.

    Raises:
        NotApplicable: packing of anything but a language model's examples, or of private ones; steps of some
            factors without those.
        ConfigError: cohorts; parts of a private step, which have a key of their own.
    """
    if config.train.alternating:
        check_alternating(config, rule)
    if config.train.nested_ranks:
        check_nested(config, rule)
    if config.train.control_variates:
        check_control(config, rule)
    check_forward(config, rule)
    if config.train.gradient_checkpointing:
        check_checkpointing(config)
    if config.model.dtype != "float32":
        check_dtype(config, rule)
    micro, private, size = config.train.micro_batch_size, config.privacy.private, config.engine.cohort_size
    if micro and private:
        raise ConfigError(
            f"train.micro-batch-size = {micro}: must be 0 where examples are private, "
            "privacy.max-physical-batch-size is that there"
        )
    if micro and config.lora.dropout > 0 and size != 1:
        raise ConfigError(
            f"train.micro-batch-size = {micro}: cohorts draw the dropout masks of a whole step; with "
            f"lora.dropout = {config.lora.dropout} engine.cohort-size must be 1"
        )
    if config.train.pass_memory and (micro or private or size > 1):
        why = "privacy.max-physical-batch-size is that there" if private else "train.micro-batch-size is set"
        why = f"engine.cohort-size = {size} must be 1" if not private and not micro else why
        raise ConfigError(f"train.pass-memory = {config.train.pass_memory:g}: {why}")
    if not config.train.packing:
        return
    if not task_named(config.task).packs:
        what = "compares pairs" if config.task == "dpo" else "has no sequences to pack"
        raise NotApplicable(f"train.packing = true: task {config.task} {what}")
    if private:
        raise NotApplicable("train.packing = true: a private example must be a row of its own to be clipped")
    if size > 1:
        raise ConfigError(
            f"train.packing = true: packed clients train alone, engine.cohort-size = {size} must be 1"
        )


def check_alternating(config: RunConfig, rule: Rule) -> None:
    """Refuse what does not let A and B move by turns.

    Raises:
        NotApplicable: a rule or a kind of adapter that does not train A and B in a round.
        ConfigError: an optimiser that moves both at once, a single step, or norms of both.
    """
    key, train, method = "train.alternating = true", config.train, config.lora.method
    trained = {rule.trained(number) for number in range(1, config.num_server_rounds + 1)}
    if method != "lora" or any(roles != PLAIN for roles in trained):
        what = rule.facts.name if method == "lora" else f"lora.method = {method!r}"
        raise NotApplicable(f"{key}: {what} does not train both A and B of lora in each round")
    if issubclass(optimizer_type(train.optimizer), LocalOptimizer):
        raise ConfigError(f"{key}: train.optimizer = {train.optimizer!r} moves A and B together")
    if train.local_steps == 1 and not train.local_epochs:
        raise ConfigError(f"{key}: train.local-steps = 1: A would never move, must be >= 2")
    if config.privacy.mode == "example" and config.privacy.grad_sample_mode == "ghost":
        raise ConfigError(
            f"{key}: privacy.grad-sample-mode = 'ghost' takes the norms of A and B together, use 'hooks'"
        )


def check_nested(config: RunConfig, rule: Rule) -> None:
    """Refuse what has no leading directions that a step could train alone.

    Raises:
        NotApplicable: a rule that trains no factor, a core between them, another kind of adapter, or
            directions at rest.
        ConfigError: an optimiser that moves all directions of a layer together.
    """
    key, method, optimizer = "train.nested-ranks = true", config.lora.method, config.train.optimizer
    if method != "lora" or not rule.facts.trained or not rule.facts.trained <= PLAIN:
        what = f"{rule.facts.name} trains no A or B" if method == "lora" else f"lora.method = {method!r}"
        raise NotApplicable(f"{key}: {what}, leading directions are of lora's")
    if rule.allocation.parts:
        raise NotApplicable(
            f"{key}: under strategy.allocation = {rule.allocation.name!r} other directions than the leading "
            "ones train"
        )
    if issubclass(optimizer_type(optimizer), LocalOptimizer):
        raise ConfigError(f"{key}: train.optimizer = {optimizer!r} moves all directions of a layer together")


def check_control(config: RunConfig, rule: Rule) -> None:
    """Refuse what leaves a client's way in a round no sum of gradients, or the aggregate no mean of all.

    Raises:
        NotApplicable: a rule, or what it is composed with, that is no plain mean of all that is trained, or
            privacy.
        ConfigError: the first key that does.
    """
    key, train, facts = "train.control-variates = true", config.train, rule.facts
    if not (streams(rule) and facts.any_kind and facts.trained <= facts.uploaded):
        rules = (r.facts for r in RULES.values())
        able = ", ".join(f.name for f in rules if f.any_kind and f.trained <= f.uploaded)
        raise NotApplicable(
            f"{key}: needs the mean of all that is trained (able: {able}, without strategy.robust)"
        )
    if rule.allocation.parts:
        raise NotApplicable(
            f"{key}: strategy.allocation = {rule.allocation.name!r} trains other directions by turns"
        )
    if config.privacy.mode != "none" or config.secure.mode != "none":
        raise NotApplicable(f"{key}: control variates are not kept in private training or secure sums")
    plain = TrainConfig(learning_rate=train.learning_rate)
    needed: dict[str, tuple[object, object]] = {
        "train.optimizer": (train.optimizer, "sgd"),
        **{
            f"train.{kebab(name)}": (getattr(train, name), getattr(plain, name))
            for name in (
                "optimizer_options", "momentum", "max_grad_norm", "schedule", "warmup_steps", "alternating",
                "nested_ranks", "local_epochs",
            )
        },
        "strategy.server-optimizer": (config.strategy.server_optimizer, "none"),
        "fraction-train": (config.fraction_train, 1.0),
        "wire-dtype": (config.wire_dtype, "float32"),
        "upload": (config.upload or "float32", "float32"),
    }  # fmt: skip
    for name, (value, only) in needed.items():
        if value != only:
            raise ConfigError(f"{key}: {name} = {value!r} must be {only!r}")
    if config.devices.timed or not config.devices.waits:
        raise ConfigError(f"{key}: devices: clients that are late or away would leave rounds without them")
    for group in config.groups:  # c is told by the mean where all take steps alike
        for field in ("schedule", "warmup_steps", "target_modules", "local_steps", "learning_rate"):
            if getattr(group, field) is not None:
                raise ConfigError(f"{key}: client-groups: no {kebab(field)} of its own")


def check_checkpointing(config: RunConfig) -> None:
    """Refuse where a block that is computed again would not be what it was.

    Raises:
        ConfigError: cohorts with dropout.
    """
    key = "train.gradient-checkpointing = true"
    if config.lora.dropout > 0 and config.engine.cohort_size != 1:
        raise ConfigError(
            f"{key}: cohorts draw a dropout mask for each layer that runs, and layers run twice; with "
            f"lora.dropout = {config.lora.dropout} engine.cohort-size must be 1"
        )


def check_dtype(config: RunConfig, rule: Rule) -> None:
    """Refuse a base in half precision where nothing would hold; warn where patches would hardly be felt.

    Raises:
        NotApplicable: pictures, another kind of adapter, private examples, or a base in 4 bits.
    """
    why = ""
    if config.privacy.private:
        why = "the self-test of private steps compares gradients to the rounding of float32"
    elif config.lora.method != "lora":
        why = f"lora.method = {config.lora.method!r} computes in float32"
    elif task_named(config.task).network == "image-classifier":
        why = f"task {config.task} computes in float32"
    elif config.model.quantization != "none":
        why = f"model.quantization = {config.model.quantization!r} says how the base is held"
    if why:
        raise NotApplicable(f"model.dtype = {config.model.dtype!r}: {why}, must be 'float32'")
    if rule.facts.updates_base or rule.init_a in TAKEN_OUT:
        warnings.warn(
            f"model.dtype = {config.model.dtype!r}: passes see what is added to the base rounded to it, "
            "small changes hardly at all (docs/tasks.md); the adapter that is written has them whole",
            stacklevel=2,
        )
