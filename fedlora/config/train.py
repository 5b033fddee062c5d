"""The ``[train]`` table: one client's local steps."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fedlora.config.checks import parse_json, require
from fedlora.config.section import by_field, section

FromZeroBelowOne = Annotated[float, Field(ge=0, lt=1)]


@section("train.")
class TrainConfig:
    """One client's work in one round. The optimiser is created anew every round."""

    optimizer: str = "adamw"
    """``adamw``, ``sgd``, ``adabelief``, ``lora-pro``, ``scaled``, or ``module:Class`` of torch's kind; see
    ``docs/optimizer.md``."""
    optimizer_options: str = ""
    """JSON object of its own arguments, for instance ``{"nesterov": true}``."""
    learning_rate: PositiveFloat = 2e-3
    """Step size of the adapter."""
    head_learning_rate: NonNegativeFloat = 0.0
    """Step size of the head; 0 means ``train.learning-rate``."""
    loraplus_lr_ratio: PositiveFloat = 1.0
    """LoRA+: the step size of B is that of A times this."""
    momentum: FromZeroBelowOne = 0.0
    """Of ``sgd`` and others that have one."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, but L2 for SGD and others of torch's that have it so."""
    local_steps: PositiveInt = 10
    """Optimiser steps a round; ignored where ``train.local-epochs`` is set."""
    local_epochs: NonNegativeInt = 0
    """Passes over the client's data a round; 0 means ``train.local-steps`` decides."""
    batch_size: PositiveInt = 8
    """Examples a step; under DP the expected number."""
    micro_batch_size: NonNegativeInt = 0
    """Examples of a step in one pass at most, whose gradients add up to the step's (gradient accumulation); 0
    means all. Under DP that is ``privacy.max-physical-batch-size``."""
    pass_memory: NonNegativeFloat = 0.0
    """GiB that a pass may keep for its backward pass, weights apart: ``train.micro-batch-size`` follows from
    it and the client's longest example; 0 means it does not."""
    packing: bool = False
    """Of language models: several examples of a step in one row, none of which sees another; see
    ``docs/training.md``."""
    dpo_beta: PositiveFloat = 0.1
    """Of task ``dpo``: how much a margin of log-likelihoods counts, TRL's ``beta``; larger stays nearer the
    base."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Clip the batch gradient to this norm (not DP); 0 means never."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``float32``, or ``bfloat16``: passes in half precision, on a CPU its products with the frozen base;
    factors stay float32."""
    gradient_checkpointing: bool = False
    """Keep the inputs of a transformer's blocks alone and compute the rest again: less memory, more time."""
    proximal_mu: NonNegativeFloat = 0.0
    """FedProx: adds mu/2 ||w - w_start||^2 over the trained tensors; 0 means off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the step sizes fall: not at all, along a line or along half a cosine; see ``docs/optimizer.md``."""
    schedule_over: Literal["round", "rounds", "run"] = "round"
    """From begin to end of each ``round``, of the ``rounds`` (the same within a round), or of the ``run``,
    step by step through all rounds."""
    schedule_floor: FromZeroBelowOne = 0.0
    """Share of the step size at which a schedule ends."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the step size first rises from 0 along a line; rounds where ``train.schedule-over`` is
    ``rounds``."""

    alternating: bool = False
    """LA-LoRA: B moves in the first step of a round, A in the second, and so on; the head in each."""
    nested_ranks: bool = False
    """DyLoRA: each step trains the leading directions of the adapter, how many is drawn, so that what a rule
    cuts off later matters least."""

    gradient: Literal["backward", "forward"] = "backward"
    """``forward``: a step takes the slope of its loss along a drawn vector in place of the gradient, by two
    passes and no backward pass; see ``docs/optimizer.md``."""
    perturbation_size: Annotated[float, Field(ge=1e-6)] = 1e-3
    """Of ``train.gradient = "forward"``: how far to either side along the vector the loss is taken, at
    least 1e-6, below which float32 sees no difference."""
    control_variates: bool = False
    """SCAFFOLD: each step is freed of what sets the client apart, by what it did in the rounds before; of
    ``sgd``, where all clients take part in every round."""

    def __post_init__(self) -> None:
        _ = self.optimizer_option_dict
        require(
            self.schedule == "constant" or self.schedule_over != "rounds" or self.schedule_floor > 0,
            "train.schedule-floor", self.schedule_floor,
            "must be > 0 where train.schedule-over = 'rounds', whose last round trains at it",
        )  # fmt: skip

    @cached_property
    def optimizer_option_dict(self) -> dict[str, Any]:
        """The decoded options."""
        return by_field(parse_json("train.optimizer-options", self.optimizer_options, dict))
