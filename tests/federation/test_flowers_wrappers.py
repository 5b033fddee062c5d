"""Flower's own wrappers for differential privacy: their noise reaches the clients, or they are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

import strategies
from fedlora.errors import ConfigError
from strategies import FedAvg, FedSVD, FFALoRA, FLoRA, HeadOnly, LoRAA2, RoLoRA, Turns, ZeroPadding
from strategies.flower import FactorStrategy
from strategies.layer import Layer, Merged, mean_a, mean_b
from strategies.named import NAMED as NAMED_STRATEGIES
from strategies.registry import make_rule
from strategies.robust import Median, MultiKrum
from strategies.rule import Rule
from strategies.rules.fedavg import FedAvgRule
from strategies.server_optimizer import ServerOptimizer
from tests.docs_commands import ROOT
from tests.federation.fake_grid import FakeGrid
from tests.federation.small import initial_arrays
from tests.federation.test_strategy import NAMED

FLAT = " ".join((ROOT / "docs" / "flower.md").read_text().split())
CLIENTS = 3
FIXED = {"noise_multiplier": 1.0, "clipping_norm": 0.5, "num_sampled_clients": CLIENTS}
ADAPTIVE = {"noise_multiplier": 0.2, "num_sampled_clients": CLIENTS}
Wrapper = Callable[..., Any]
WRAPPERS: list[tuple[Wrapper, dict[str, float], Any]] = [
    (DifferentialPrivacyServerSideFixedClipping, FIXED, None),
    (DifferentialPrivacyClientSideFixedClipping, FIXED, fixedclipping_mod),
    (DifferentialPrivacyServerSideAdaptiveClipping, ADAPTIVE, None),
    (DifferentialPrivacyClientSideAdaptiveClipping, ADAPTIVE, adaptiveclipping_mod),
]
each_wrapper = pytest.mark.parametrize(
    ("wrapper", "settings", "mod"), WRAPPERS, ids=lambda w: getattr(w, "__name__", "")
)


class PlainClient:
    """Moves the factors that it is told to train, as Flower's users write it; remembers what it was sent."""

    def __init__(self, mod: Any = None) -> None:
        self.mod = mod
        self.sent: dict[tuple[str, int], ArrayRecord] = {}

    def __call__(self, message: Message, partition: int) -> Message:
        if self.mod is None or message.metadata.message_type != "train":
            return self.app(message, None)
        reply: Message = self.mod(message, None, self.app)
        return reply

    def app(self, message: Message, _: object) -> Message:
        kind, config = message.metadata.message_type, message.content["config"]
        self.sent[kind, int(config["server-round"])] = message.content["arrays"]
        content = RecordDict({"metrics": MetricRecord({"num-examples": 4, "loss": 1.0})})
        if kind == "train":
            trained = str(config.get("trained", "A,B")).split(",")
            rests = tuple(f"lora_{x}.weight" for x in "AB" if x not in trained)
            tensors = message.content["arrays"].to_torch_state_dict()
            moved = {k: t + (0.0 if k.endswith(rests) else 0.1) for k, t in tensors.items()}
            content["arrays"] = ArrayRecord(moved)
        return Message(content, reply_to=message)


def run(strategy: Any, client: PlainClient, rounds: int = 3) -> ArrayRecord:
    np.random.seed(5)  # Flower draws its noise from the global stream
    arrays: ArrayRecord = strategy.start(
        FakeGrid(range(CLIENTS), client), initial_arrays(), num_rounds=rounds, train_config=ConfigRecord()
    ).arrays
    return arrays


def same(one: ArrayRecord, other: ArrayRecord) -> bool:
    return one.keys() == other.keys() and all(
        np.allclose(a.numpy(), other[k].numpy(), atol=1e-6) for k, a in one.items()
    )


@each_wrapper
@pytest.mark.parametrize(
    "named", [FedAvg, FFALoRA, RoLoRA, HeadOnly, Turns, ZeroPadding, partial(LoRAA2, upload="float32")]
)
def test_the_next_order_holds_the_noise(
    named: Callable[..., FactorStrategy], wrapper: Wrapper, settings: dict[str, float], mod: Any
) -> None:
    """Clients train on, and evaluate, the very arrays that the wrapper made of the aggregate."""
    released: list[ArrayRecord] = []
    inner, client = named(scaling=2.0), PlainClient(mod)
    strategy = wrapper(inner, **settings)
    aggregate = strategy.aggregate_train

    def watched(server_round: int, replies: Any) -> Any:
        arrays, metrics = aggregate(server_round, replies)
        released.append(arrays)
        return arrays, metrics

    strategy.aggregate_train = watched
    run(strategy, client)
    assert inner.report.refused == {}
    assert inner.report.diagnostics is None
    for t in (1, 2, 3):
        assert same(client.sent["evaluate", t], released[t - 1])
    for t in (2, 3):
        assert same(client.sent["train", t], released[t - 2])


@each_wrapper
def test_fedavg_ends_where_flowers_fedavg_ends(
    wrapper: Wrapper, settings: dict[str, float], mod: Any
) -> None:
    """The same noise, drawn from the same stream, over three rounds."""
    ours = run(wrapper(FedAvg(scaling=2.0), **settings), PlainClient(mod))
    theirs = run(wrapper(FlowersFedAvg(), **settings), PlainClient(mod))
    assert same(ours, theirs)


class OwnMean(Rule):
    """A rule of a user's own that averages by itself, like that of docs/strategy.md."""

    facts = replace(FedAvgRule.facts, name="own-mean")

    def merge(self, layer: Layer) -> Merged:
        return Merged(replace(layer.start, A=mean_a(layer), B=mean_b(layer)))


REFUSED: dict[str, tuple[FactorStrategy, str]] = {
    "no mean": (FLoRA(), "FLoRA: its aggregate is no mean"),
    "turned": (FedSVD(), "FedSVD: it writes the mean in another basis"),
    "robust": (FedAvg(center=Median()), "a robust centre or a server optimiser"),
    "robust rule of one's own": (
        FactorStrategy(make_rule(OwnMean, center=MultiKrum())),
        "a robust centre or a server optimiser",
    ),
    "optimiser": (FedAvg(optimizer=ServerOptimizer(name="fedavgm")), "a robust centre or a server optimiser"),
    "another start": (FFALoRA(init_a="orthonormal"), "leave out init_a"),
    "half": (FedAvg(wire_dtype="float16"), "leave out init_a, wire_dtype"),
    "coded": (FedAvg(upload="int8"), "leave out init_a, wire_dtype, upload"),
}


@each_wrapper
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_noise_does_not_cover_is_refused_where_the_wrapper_is_built(
    name: str, wrapper: Wrapper, settings: dict[str, float], mod: Any
) -> None:
    strategy, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as error:
        wrapper(strategy=strategy, **settings)
    assert str(error.value).startswith(f"{wrapper.__name__} around ")
    assert "\n" not in str(error.value)


def test_every_strategy_fits_or_is_refused() -> None:
    fit = set()
    for named in NAMED:
        try:
            DifferentialPrivacyServerSideFixedClipping(named(), **FIXED)
            fit.add(named.rule_type.facts.name)
        except ConfigError:
            continue
    assert fit == {"fedavg", "ffa", "rolora", "turns", "head-only", "zero-padding"}
    assert fit <= {name for name, rule in strategies.RULES.items() if rule.facts.mean}


def test_arrays_that_another_loop_changed_are_taken_or_refused() -> None:
    """Whatever stands between two rounds, not only Flower's wrappers."""
    for strategy, taken in ((FedAvg(scaling=2.0), True), (FLoRA(scaling=2.0), False)):
        grid, initial = FakeGrid(range(CLIENTS), PlainClient()), initial_arrays()
        strategy.configure_train(1, initial, ConfigRecord(), grid)
        changed = ArrayRecord({k: t + 1.0 for k, t in initial.to_torch_state_dict().items()})
        if taken:
            first, *_ = strategy.configure_train(2, changed, ConfigRecord(), grid)
            assert same(first.content["arrays"], changed)
            continue
        with pytest.raises(ConfigError, match="FLoRA: the arrays were changed between rounds"):
            strategy.configure_train(2, changed, ConfigRecord(), grid)


def test_a_rule_of_ones_own_that_is_bare_is_taken() -> None:
    for wrapper, settings, _ in WRAPPERS:
        wrapper(FactorStrategy(make_rule(OwnMean)), **settings)


def taken(**options: Any) -> set[str]:
    """Public strategies that a wrapper is built around."""
    found = set[str]()
    for name, kind in NAMED_STRATEGIES.items():
        with suppress(ConfigError):
            DifferentialPrivacyServerSideFixedClipping(kind(**options), **FIXED)
            found.add(name)
    return found


def test_the_page_lists_the_strategies_that_wrappers_take() -> None:
    plain, odd = re.search(r"work around (`FedAvg`.*?), and around (.*?): the next", FLAT, re.S).groups()  # type: ignore[union-attr]
    assert set(re.findall(r"`(\w+)`", plain)) == taken()
    name, upload = re.fullmatch(r"`(\w+)` with `upload=\"(\w+)\"`", odd).groups()  # type: ignore[union-attr]
    assert {name} == taken(upload=upload) - taken()


def test_the_page_lists_the_strategies_that_add_patches() -> None:
    (listed,) = re.findall(r"What is different is the base\. (.*?) add a \*patch\*", FLAT)
    titles = {rule.facts.title for rule in strategies.RULES.values() if rule.facts.updates_base}
    said = {re.sub(r"^renewed (.*)", r"\1, renewed", name) for name in re.split(r", | and ", listed)}
    assert said == titles
