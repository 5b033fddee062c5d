"""The local optimisers by name, their options checked, and an optimiser made for what a client trains."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from clients.training.optimizers.adabelief import AdaBelief
from clients.training.optimizers.local import Layer, LocalOptimizer
from clients.training.optimizers.lora_pro import LoRAPro
from clients.training.optimizers.scaled import ScaledGD
from fedlora.config import TrainConfig
from fedlora.config.section import snake
from fedlora.core.code import import_own
from fedlora.core.state import Trainable
from fedlora.errors import OR_YOUR_OWN, ConfigError, named_line, unknown_name

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adabelief": AdaBelief,
    "lora-pro": LoRAPro,
    "scaled": ScaledGD,
}
"""In the order of the documentation; any other is ``module:Class``."""
STACKED = (torch.optim.AdamW, torch.optim.SGD, AdaBelief)
"""Those that look at each number alone, so that a cohort may step at once, see `LocalOptimizer`."""
MOST_REHEARSED = 100
"""Steps on made-up tensors."""
NOTHING = 'nothing is trained: the strategy trains no factor and model.head = "freeze"'
OWN_KEYS = {"lr": "learning-rate", "momentum": "momentum", "weight_decay": "weight-decay"}
"""Arguments that are keys of ``train``, not options."""


def optimizer_type(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name, listed or ``module:Class``.

    Raises:
        ConfigError: there is none, it cannot be imported, or it is no optimiser of torch's kind.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if ":" not in name:
        raise unknown_name("train.optimizer", name, OPTIMIZERS, OR_YOUR_OWN)
    found = import_own("train.optimizer", name)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"train.optimizer = {name!r}: is no subclass of torch.optim.Optimizer")
    if any(p.default is p.empty for p in list(inspect.signature(found.step).parameters.values())[1:]):
        raise ConfigError(f"train.optimizer = {name!r}: its step needs a closure, here it is called without")
    return found


def is_stacked(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether one such optimiser may step for a whole cohort, on stacked tensors."""
    return kind.stacked if issubclass(kind, LocalOptimizer) else kind in STACKED


def make_optimizer(trained: Trainable, config: TrainConfig) -> torch.optim.Optimizer:
    """A new optimiser over what is trained.

    Args:
        trained: one client's parameters, or those of a cohort, stacked.
        config: which optimiser, with which options and rates.

    Raises:
        ConfigError: nothing is trained, or the optimiser refuses its options.
    """
    kind = optimizer_type(config.optimizer)
    options = arguments(kind, config)
    of = layer_groups if issubclass(kind, LocalOptimizer) else rate_groups
    groups = of(trained, config)
    if not groups:
        raise ConfigError(NOTHING)
    try:
        made = kind(groups, **options)
        begin = getattr(made, "train", None)
        if callable(begin):
            begin()
        return made
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"train.optimizer = {config.optimizer!r}: cannot be made with train.optimizer-options = "
            f"{config.optimizer_options!r} ({named_line(error)})"
        ) from None


def finish(optimizer: torch.optim.Optimizer) -> None:
    """After the last step: schedule-free optimisers train other values than are to be read, and swap them."""
    swap = getattr(optimizer, "eval", None)
    if callable(swap):
        swap()


def rate_groups(trained: Trainable, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups by step size; all in their own order, in which noise is drawn for them.

    B may move faster than A: Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models",
    ICML 2024 (arXiv 2402.12354).
    """
    faster = {True: config.loraplus_lr_ratio, False: 1.0}
    factors = trained.factors
    runs = groupby(factors, lambda name: name.endswith(".B") and config.loraplus_lr_ratio != 1)
    groups = [
        {"params": [factors[name] for name in names], "lr": faster[is_b] * config.learning_rate}
        for is_b, names in runs
    ]
    return [*groups, *_head_groups(trained, config)]


def layer_groups(trained: Trainable, config: TrainConfig) -> list[dict[str, Any]]:
    """A parameter group for each layer, which has it as its `Layer`; the order is that of `rate_groups`.

    Raises:
        ConfigError: A and B are to move at rates of their own.
    """
    if config.loraplus_lr_ratio != 1:
        raise ConfigError(
            f"train.loraplus-lr-ratio = {config.loraplus_lr_ratio}: {config.optimizer} moves A and B "
            "together, must be 1"
        )
    factors: dict[str, Tensor] = {**trained.frozen, **trained.factors}
    groups = []
    for module, names in groupby(trained.factors, lambda name: name.rpartition(".")[0]):
        letters = tuple(name.rpartition(".")[2] for name in names)
        layer = Layer(
            name=module,
            factors={x: factors[f"{module}.{x}"] for x in "ABR" if f"{module}.{x}" in factors},
            trained=letters,
            scaling=trained.scaling[module],
        )
        params = [trained.factors[f"{module}.{x}"] for x in letters]
        groups.append({"params": params, "lr": config.learning_rate, "layer": layer})
    return [*groups, *_head_groups(trained, config)]


def _head_groups(trained: Trainable, config: TrainConfig) -> list[dict[str, Any]]:
    rate = config.head_learning_rate or config.learning_rate
    return [{"params": list(trained.head.values()), "lr": rate}] if trained.head else []


def arguments(kind: type[torch.optim.Optimizer], config: TrainConfig) -> dict[str, Any]:
    """The arguments of an optimiser: the keys of ``train`` that it knows, and its options.

    Raises:
        ConfigError: an unknown option, a value of another type, or a key that this optimiser does not know.
    """
    name = config.optimizer
    known = dict(list(inspect.signature(kind).parameters.items())[1:])  # the first takes the groups
    given: dict[str, Any] = {}
    for argument, key in OWN_KEYS.items():
        value = getattr(config, snake(key))
        if argument in known:
            given[argument] = value
        elif value and argument != "lr":  # a rate is in each group
            raise ConfigError(f"train.{key} = {value}: {name} has none, must be 0")
    options = {
        argument: parameter.default
        for argument, parameter in known.items()
        if argument not in OWN_KEYS
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    for key, value in config.optimizer_option_dict.items():
        shown = f"train.optimizer-options {key} = {value!r}"
        if key in OWN_KEYS:
            raise ConfigError(f"{shown}: is train.{OWN_KEYS[key]}")
        if key not in options:
            raise ConfigError(f"{shown}: {name} accepts {', '.join(options) or 'none'}")
        given[key] = _typed(shown, name, value, options[key])
    return given


def _typed(shown: str, name: str, value: Any, default: Any) -> Any:
    """A value of the type of its default; JSON's lists are tuples."""
    if isinstance(value, list):
        value = tuple(value)
    if default is None or default is inspect.Parameter.empty or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    kind = "list" if isinstance(default, tuple) else type(default).__name__
    raise ConfigError(f"{shown}: {name} expects {kind}")


def check_optimizer(
    config: TrainConfig, *, trained: Collection[frozenset[str]], head: bool, blocks: bool = False
) -> None:
    """Take steps on made-up tensors, so that what no client could train by is refused before a run.

    Args:
        config: names the optimiser.
        trained: the factors that a run trains, for each round that trains others.
        head: whether it trains a head.
        blocks: whether a core that it trains is one in blocks.

    Raises:
        ConfigError: whatever is wrong with it, in one line.
    """
    for letters in trained:
        made_up = _made_up(letters, head=head, blocks=blocks)
        optimizer = make_optimizer(made_up, config)
        before = torch.get_rng_state()
        try:
            optimizer.step()
        except Exception as error:
            shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in _named(made_up).items())
            raise ConfigError(
                f"train.optimizer = {config.optimizer!r}: takes no step on {shapes} ({named_line(error)})"
            ) from None
        if not torch.equal(before, torch.get_rng_state()):
            raise ConfigError(
                f"train.optimizer = {config.optimizer!r}: draws random numbers outside the client's streams"
            )
        if not all(parameter.isfinite().all() for parameter in made_up.all):
            raise ConfigError(f"train.optimizer = {config.optimizer!r}: its first step is not finite")
        begins = [_made_up(letters, head=head, blocks=blocks, size=size) for size in (1.0, 0.0)]
        if not config.local_epochs and not any(_moves(one, config) for one in begins):
            raise ConfigError(
                f"train.optimizer = {config.optimizer!r}: moves nothing in train.local-steps = "
                f"{config.local_steps} steps, and begins anew in each round"
            )


def _moves(made_up: Trainable, config: TrainConfig) -> bool:
    """Whether anything of `_made_up` moves in a round's steps; where they are very many, it is not asked."""
    optimizer = make_optimizer(made_up, config)
    begun = [parameter.detach().clone() for parameter in made_up.all]
    for _ in range(min(config.local_steps, MOST_REHEARSED)):
        optimizer.step()
        if any(not torch.equal(p, start) for p, start in zip(made_up.all, begun, strict=True)):
            return True
    return config.local_steps > MOST_REHEARSED


def _made_up(letters: frozenset[str], *, head: bool, blocks: bool, size: float = 1.0) -> Trainable:
    """One layer and perhaps a head, of values of that size, with gradients."""
    core: tuple[int, ...] = (2, 1, 1) if blocks else (2, 2)
    shapes: dict[str, tuple[int, ...]] = {"A": (2, 5), "B": (4, 2)} | ({"R": core} if "R" in letters else {})
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> nn.Parameter:
        parameter = nn.Parameter(size * torch.randn(shape, generator=generator))
        parameter.grad = torch.randn(shape, generator=generator)
        return parameter

    factors = {f"layer.{x}": drawn(*shape) for x, shape in shapes.items()}
    return Trainable(
        factors={name: p for name, p in factors.items() if name[-1] in letters},
        head={"head.weight": drawn(3, 5), "head.bias": drawn(3)} if head else {},
        frozen={name: p for name, p in factors.items() if name[-1] not in letters},
        scaling={"layer": 2.0},
    )


def _named(trained: Trainable) -> Mapping[str, nn.Parameter]:
    return {**trained.factors, **trained.head}
