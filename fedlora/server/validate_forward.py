"""Validation of forward-only steps, and of a round that is told by their seeds."""

from __future__ import annotations

from collections.abc import Mapping

from fedlora import wire
from fedlora.config import RunConfig, TrainConfig
from fedlora.config.section import kebab
from fedlora.errors import ConfigError, NotApplicable
from strategies.rule import Rule
from strategies.uploads import codec_of


def check_forward(config: RunConfig, rule: Rule) -> None:
    """Refuse forward-only steps where a gradient of its own is needed; seeds where they would not tell all.

    Raises:
        NotApplicable: private examples, factors that move by turns or in part, control variates; seeds where
            directions rest, tails are penalised, or devices take time by bytes.
        ConfigError: half precision; with seeds the first key by which a round is more than plain SGD.
    """
    train, key = config.train, "train.gradient = 'forward'"
    if train.gradient == "forward":
        if config.privacy.private:
            raise NotApplicable(f"{key}: DP-SGD clips gradients of examples, privacy.mode must be 'none'")
        half = {"train.precision": train.precision, "model.dtype": config.model.dtype}
        for name, kind in half.items():
            if kind != "float32":
                raise ConfigError(f"{key}: {name} = {kind!r} must be 'float32', slopes are small differences")
        for name in ("alternating", "nested_ranks", "control_variates"):
            if getattr(train, name):
                raise NotApplicable(f"{key}: train.{kebab(name)} = true needs gradients of single factors")
    upload = codec_of(config.upload, rule, config.wire_dtype)
    if not wire.codec_named(upload).of_steps:
        return
    key = f"upload = {upload!r}"
    if train.gradient != "forward":
        raise ConfigError(
            f"{key}: train.gradient = {train.gradient!r} must be 'forward', it tells such steps"
        )
    why = _not_told(config, rule)
    if why:
        raise NotApplicable(f"{key}: {why}, which seeds do not tell")
    for name, (value, only) in _plain(train).items():
        if value != only:
            raise ConfigError(f"{key}: {name} = {value!r} must be {only!r}, seeds tell steps of plain SGD")
    if not train.local_epochs and train.local_steps > wire.MOST_MOVES:
        raise ConfigError(f"{key}: train.local-steps = {train.local_steps} must be <= {wire.MOST_MOVES}")


def _not_told(config: RunConfig, rule: Rule) -> str:
    """What a round has that steps along perturbations of all that is trained do not tell."""
    if rule.allocation.parts or rule.facts.chooses_directions:
        return f"{rule.facts.name} leaves directions at rest"
    if rule.penalises_tails:
        return f"{rule.facts.name} penalises tails"
    return "devices take time by the bytes of tensors" if config.devices.timed else ""


def _plain(train: TrainConfig) -> Mapping[str, tuple[object, object]]:
    """Keys, what they are, and what they must be."""
    plain = TrainConfig(optimizer="sgd", gradient="forward")
    names = "optimizer", "optimizer_options", "momentum", "weight_decay", "max_grad_norm", "proximal_mu"
    own = {f"train.{kebab(n)}": (getattr(train, n), getattr(plain, n)) for n in (*names, "loraplus_lr_ratio")}
    head = train.head_learning_rate or train.learning_rate
    return own | {"train.head-learning-rate": (head, train.learning_rate)}
