"""Nothing is trained privately on a model on which Opacus does something else than it claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import clients.training.self_check
from clients.training import batches, dp_sgd
from clients.training.batches import shuffled_batches
from clients.training.dp_mechanism import Mechanism
from clients.training.self_check import check_draws, self_check
from fedlora.config import ModelConfig, TrainConfig
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.privacy import plausible
from tests.clients.broken_steps import BEFORE_NOISE, BREAKS, IN_THE_NUMBERS, WHO_DRAWS, noise_times
from tests.clients.measures import traces, values
from tests.clients.samples import PAD, everyone, examples, loaded, reload, train_by_dp_sgd
from tests.conftest import ALL_DRAWS
from tests.models.samples import random_adapters, save_tiny_gpt2

HOOKS = Mechanism(noise_multiplier=0.8, max_grad_norm=0.5, expected_batch_size=16)
GHOST = replace(HOOKS, grad_sample_mode="ghost")
LAYERS = replace(HOOKS, clipping="per-layer")
WAYS = {
    "hooks": HOOKS,
    "ghost": GHOST,
    "per-layer": LAYERS,
    "chunks": replace(GHOST, max_physical_batch_size=3),
}
EVERY_WAY = {**WAYS, **{f"{name}-secure": replace(way, secure=True) for name, way in WAYS.items()}}


@pytest.fixture(autouse=True)
def few_draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for all but the finest flaw; a tiny model takes hundreds of steps to draw more."""
    finest = "1 % too much" in request.node.name or "all_its_draws" in request.node.name
    monkeypatch.setattr(plausible, "NOISE_DRAWS", ALL_DRAWS if finest else 40_000)


def check(model: AdaptedModel, mechanism: Mechanism) -> None:
    self_check(model, PAD, mechanism)


@pytest.mark.parametrize(
    ("trained", "way"), [("AB", way) for way in EVERY_WAY] + [(t, way) for t in ("B", "") for way in WAYS]
)
def test_it_passes_and_leaves_no_trace(trained: str, way: str) -> None:
    model = loaded(trained=frozenset(trained), dropout=0.5)
    before, state = values(model), torch.get_rng_state()
    check(model, EVERY_WAY[way])
    assert all(torch.equal(t, before[name]) for name, t in values(model).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert traces(model) == []


@pytest.mark.parametrize("way", ["hooks", "ghost-secure"])
def test_it_passes_with_all_its_draws(way: str) -> None:
    check(loaded(), EVERY_WAY[way])


@pytest.mark.parametrize("mechanism", [HOOKS, GHOST, LAYERS], ids=["hooks", "ghost", "per-layer"])
def test_it_passes_on_other_architectures(mechanism: Mechanism, tmp_path: Path) -> None:
    """Transposed layers, a decoder that looks for its last token, and three labels."""
    for name, pooling in ((str(save_tiny_gpt2(tmp_path)), "model"), ("tiny", "model")):
        network = build_model(ModelConfig(name=name, pooling=pooling), 3, 0)
        model = AdaptedModel(network, resolve_targets(network, ""))
        adapters = random_adapters(model.modules, 2)
        model.load(adapters, {}, trained=frozenset("AB"), train_head=True)
        self_check(model, int(model.module.config.pad_token_id), mechanism)


@pytest.mark.parametrize("mechanism", [HOOKS, GHOST, LAYERS], ids=["hooks", "ghost", "per-layer"])
@pytest.mark.parametrize(("trained", "heads"), [("R", 1), ("ABR", 1), ("R", 2), ("R", 4)])
def test_it_passes_with_a_core_between_the_factors(trained: str, heads: int, mechanism: Mechanism) -> None:
    model = loaded()
    core = torch.eye(4) + 0.1 if heads == 1 else torch.eye(4 // heads).expand(heads, -1, -1) + 0.1
    adapters = {name: replace(f, R=core) for name, f in random_adapters(model.modules, 4).items()}
    model.load(adapters, {}, trained=frozenset(trained), train_head=True)
    check(model, mechanism)


BROKEN = [
    *((fault, way) for fault in BEFORE_NOISE for way in WAYS),
    *((fault, way) for fault in WHO_DRAWS for way in EVERY_WAY),
    *((fault, way) for fault in IN_THE_NUMBERS for way in ("hooks", "ghost-secure")),
]


@pytest.mark.parametrize(("fault", "way"), BROKEN)
def test_it_refuses_what_is_broken(fault: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (broken, message), model = BREAKS[fault], loaded()
    before = values(model)
    broken(monkeypatch)
    with pytest.raises(
        RunFailed, match=rf"^privacy self-test: {message}.*, nothing was trained(; try .+ slower)?$"
    ):
        check(model, EVERY_WAY[way])
    assert all(torch.equal(t, before[name]) for name, t in values(model).items())
    assert traces(model) == []


def train(model: AdaptedModel, **changes: Any) -> None:
    chosen: dict[str, Any] = {"noise_multiplier": 0.8, "max_grad_norm": 0.5, "local_steps": 1, "seed": 1}
    data = examples()
    train_by_dp_sgd(model, data, everyone(data), PAD, TrainConfig(), **{**chosen, **changes})


def test_no_private_training_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses before the first step, each time anew."""
    noise_times(0.5)(monkeypatch)
    model = loaded()
    before = values(model)
    for _ in range(2):
        with pytest.raises(RunFailed, match="privacy self-test"):
            train(model)
    assert all(torch.equal(t, before[name]) for name, t in values(model).items())
    monkeypatch.undo()
    train(model)


def test_it_is_asked_once_for_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("check_steps", "check_noise"):
        real = getattr(clients.training.self_check, name)

        def counted(*arguments: Any, name: str = name, real: Any = real) -> None:
            asked.append(name.removeprefix("check_"))
            real(*arguments)

        monkeypatch.setattr(clients.training.self_check, name, counted)
    model = loaded()

    def newly(**changes: Any) -> list[str]:
        asked.clear()
        train(model, **changes)
        return list(asked)

    both = ["steps", "noise"]
    assert newly() == both
    assert newly(seed=2) == []
    assert newly(noise_multiplier=0.9) == newly(max_grad_norm=0.4) == ["noise"]
    changes = {
        "grad_sample_mode": "ghost",
        "clipping": "per-layer",
        "secure": True,
        "max_physical_batch_size": 2,
    }
    for key, value in changes.items():
        assert newly(**{key: value}) == both
    reload(model, rank=2)
    assert newly() == both
    reload(model, trained=frozenset("B"))
    assert newly() == both
    reload(model)
    assert newly() == []


def test_draws_that_are_not_poisson_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = batches.poisson_batches

    def shuffled(indices: Any, rate: float, steps: int, rng: Any) -> Any:
        return shuffled_batches(indices, round(rate * len(indices)), steps, rng)

    def twice_the_rate(indices: Any, rate: float, steps: int, rng: Any) -> Any:
        return real(indices, 2 * rate, steps, rng)

    def the_same_again(indices: Any, rate: float, steps: int, rng: Any) -> Any:
        for batch in real(indices, rate, steps // 2, rng):
            yield from (batch, batch)

    check_draws()
    for broken, message in (
        (shuffled, "differ too little in size"),
        (twice_the_rate, r"examples were drawn in 400 steps, claimed are about 40000"),
        (the_same_again, "differ too much in size|drawn in 399 steps"),
    ):
        monkeypatch.setattr(batches, "poisson_batches", broken)
        with pytest.raises(RunFailed, match=message):
            check_draws()


def test_a_round_that_was_drawn_with_another_rate_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dp_sgd.poisson_batches
    model, config = loaded(), TrainConfig(batch_size=8)
    data = examples()
    options: Any = {"local_steps": 60, "noise_multiplier": 0.8, "max_grad_norm": 0.5, "seed": 1}
    train_by_dp_sgd(model, data, everyone(data), PAD, config, **options)
    monkeypatch.setattr(dp_sgd, "poisson_batches", lambda all, rate, *rest: real(all, 2 * rate, *rest))
    with pytest.raises(RunFailed, match=r"examples were drawn in 60 steps.*nothing is released"):
        train_by_dp_sgd(model, data, everyone(data), PAD, config, **options)
