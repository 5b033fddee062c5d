"""Nothing is trained privately on a model on which Opacus does something else than it claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import opacus.grad_sample
import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping, DPPerLayerOptimizer
from torch import Tensor

import clients.training.self_check
from clients.training import batches, dp_sgd
from clients.training.batches import shuffled_batches
from clients.training.dp_mechanism import Mechanism
from clients.training.opacus_parts import SystemNoise
from clients.training.self_check import check_draws, self_check
from fedlora.config import ModelConfig, TrainConfig
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel, build_model, resolve_targets
from tests.clients.measures import traces, values
from tests.clients.samples import PAD, everyone, examples, loaded, reload, train_by_dp_sgd
from tests.models.samples import random_adapters, save_tiny_gpt2

Break = Callable[[pytest.MonkeyPatch], None]
LINEAR = torch.nn.Linear
HOOKS = Mechanism(noise_multiplier=0.8, max_grad_norm=0.5, expected_batch_size=16)
GHOST = replace(HOOKS, grad_sample_mode="ghost")
LAYERS = replace(HOOKS, clipping="per-layer")
WAYS = {
    "hooks": HOOKS,
    "ghost": GHOST,
    "per-layer": LAYERS,
    "chunks": replace(GHOST, max_physical_batch_size=3),
}
SECURE = {f"{name}-secure": replace(way, secure=True) for name, way in WAYS.items()}


@pytest.fixture(autouse=True)
def few_draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for all but the finest flaw; a tiny model takes hundreds of steps to draw more."""
    if "1 % too much" not in request.node.name:
        monkeypatch.setattr(clients.training.self_check, "NOISE_DRAWS", 40_000)


def check(model: AdaptedModel, mechanism: Mechanism) -> None:
    self_check(model, PAD, mechanism)


@pytest.mark.parametrize("mechanism", [*WAYS.values(), *SECURE.values()], ids=[*WAYS, *SECURE])
@pytest.mark.parametrize("trained", ["AB", "B", ""])
def test_it_passes_and_leaves_no_trace(trained: str, mechanism: Mechanism) -> None:
    model = loaded(trained=frozenset(trained), dropout=0.5)
    before, state = values(model), torch.get_rng_state()
    check(model, mechanism)
    assert all(torch.equal(t, before[name]) for name, t in values(model).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert traces(model) == []


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
@pytest.mark.parametrize("trained", ["R", "ABR"])
def test_it_passes_with_a_core_between_the_factors(trained: str, mechanism: Mechanism) -> None:
    model = loaded()
    core = torch.eye(4) + 0.1
    adapters = {name: replace(f, R=core) for name, f in random_adapters(model.modules, 4).items()}
    model.load(adapters, {}, trained=frozenset(trained), train_head=True)
    check(model, mechanism)


def mean_for_sum(patch: pytest.MonkeyPatch) -> None:
    """Opacus is told that the loss is a mean, and multiplies what it finds by the batch."""
    for name in ("GradSampleModule", "GradSampleModuleFastGradientClipping"):
        real = getattr(opacus.grad_sample, name)

        def told(network: Any, *, loss_reduction: str, real: Any = real, **options: Any) -> Any:
            return real(network, loss_reduction="mean", **options)

        patch.setattr(opacus.grad_sample, name, told)


def sampler(change: Callable[[Tensor], Tensor]) -> Break:
    """Every linear layer's hook gives something else, for both kinds of hooks."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        for table in (GradSampleModule.GRAD_SAMPLERS, GradSampleModuleFastGradientClipping.NORM_SAMPLERS):
            real = table[LINEAR]

            def call(*arguments: Any, real: Any = real) -> Any:
                return {p: change(g) for p, g in real(*arguments).items()}

            patch.setitem(table, LINEAR, call)

    return broken


def one_layer_doubled(patch: pytest.MonkeyPatch) -> None:
    """Only in the layer with the fewest numbers, which is easy to overlook."""
    for table in (GradSampleModule.GRAD_SAMPLERS, GradSampleModuleFastGradientClipping.NORM_SAMPLERS):
        real = table[LINEAR]

        def call(layer: Any, *arguments: Any, real: Any = real) -> Any:
            found = real(layer, *arguments)
            return {p: 2 * g for p, g in found.items()} if layer.bias is not None else found

        patch.setitem(table, LINEAR, call)


def unscaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DPOptimizer, "scale_grad", lambda _: None)


def unclipped(patch: pytest.MonkeyPatch) -> None:
    """Everybody's gradient is added as it is."""

    def clip_and_accumulate(self: Any) -> None:
        for parameter in self.params:
            parameter.summed_grad = parameter.grad_sample.sum(dim=0)

    patch.setattr(DPOptimizer, "clip_and_accumulate", clip_and_accumulate)
    patch.setattr(DPPerLayerOptimizer, "clip_and_accumulate", clip_and_accumulate)
    ones = GradSampleModuleFastGradientClipping.get_norm_sample
    patch.setattr(
        GradSampleModuleFastGradientClipping, "get_clipping_coef", lambda self: torch.ones_like(ones(self))
    )


def noise_again(patch: pytest.MonkeyPatch) -> None:
    """What was drawn first for a tensor is its noise in every step."""
    for kind in (DPOptimizer, DPOptimizerFastGradientClipping, SystemNoise):
        real, first = kind.__dict__["add_noise"], dict[int, torch.Tensor]()

        def add_noise(self: Any, real: Any = real, first: Any = first) -> None:
            real(self)
            for number, parameter in enumerate(self.params):
                noise = parameter.grad - parameter.summed_grad
                if noise.any():
                    parameter.grad = parameter.summed_grad + first.setdefault(number, noise)

        patch.setattr(kind, "add_noise", add_noise)


def noise_times(factor: float, only: int | None = None) -> Break:
    """All noise is that much larger, or only that on one tensor."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        for kind in (DPOptimizer, DPOptimizerFastGradientClipping, SystemNoise):
            real = kind.__dict__["add_noise"]

            def add_noise(self: Any, real: Any = real) -> None:
                real(self)
                for number, parameter in enumerate(self.params):
                    if only in (None, number):
                        noise = parameter.grad - parameter.summed_grad
                        parameter.grad = parameter.summed_grad + factor * noise

            patch.setattr(kind, "add_noise", add_noise)

    return broken


def noise_through(change: Callable[[Tensor], Tensor]) -> Break:
    """All noise is made into other noise of the same size."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        for kind in (DPOptimizer, DPOptimizerFastGradientClipping, SystemNoise):
            real = kind.__dict__["add_noise"]

            def add_noise(self: Any, real: Any = real) -> None:
                real(self)
                for parameter in self.params:
                    noise = parameter.grad - parameter.summed_grad
                    if noise.any():
                        std = self.noise_multiplier * self.max_grad_norm
                        std = std if isinstance(std, float) else self.noise_multiplier * 0.5
                        parameter.grad = parameter.summed_grad + std * change(noise.flatten() / std).reshape(
                            noise.shape
                        )

            patch.setattr(kind, "add_noise", add_noise)

    return broken


def each_twice(noise: Tensor) -> Tensor:
    return noise[: (len(noise) + 1) // 2].repeat_interleave(2)[: len(noise)]


def neighbours_alike(noise: Tensor) -> Tensor:
    return (noise + 0.2 * noise.roll(1)) / (1 + 0.2**2) ** 0.5


def as_uniform(noise: Tensor) -> Tensor:
    return (torch.special.ndtr(noise) - 0.5) * 12**0.5


BREAKS: dict[str, tuple[Break, str]] = {
    "mean for sum": (mean_for_sum, r"per-example gradient"),
    "doubled": (sampler(lambda g: 2 * g), r"per-example gradient"),
    "one layer doubled": (one_layer_doubled, r"per-example gradient(s| norms) of classifier\.weight"),
    "mixed up": (sampler(lambda g: g.roll(1, dims=0)), r"per-example gradient"),
    "not averaged": (unscaled, r"the noise-free step of \S+: wrong"),
    "not clipped": (unclipped, r"the clipped step of \S+: wrong"),
    "half the noise": (
        noise_times(0.5),
        r"the noise on \S+ has standard deviation 0\.012\d*, claimed is 0\.025",
    ),
    "5 % too little": (noise_times(1 / 1.05), r"the noise on .+ has standard deviation"),
    "5 % too much": (noise_times(1.05), r"the noise on .+ has standard deviation"),
    "the same again": (noise_again, "the same noise came twice"),
    "1 % too much": (noise_times(1.01), r"the noise on .+ has standard deviation"),
    "each number twice": (noise_through(each_twice), r"the noise on .+ is correlated"),
    "correlated": (noise_through(neighbours_alike), r"the noise on .+ is correlated from number to number"),
    "uniform": (noise_through(as_uniform), r"the noise on .+ is not normally distributed"),
    "one tensor bare": (noise_times(0.0, only=1), r"the noise on \S+ has standard deviation 0,"),
}


@pytest.mark.parametrize("mechanism", [*WAYS.values(), *SECURE.values()], ids=[*WAYS, *SECURE])
@pytest.mark.parametrize(("broken", "message"), BREAKS.values(), ids=BREAKS)
def test_it_refuses_what_is_broken(
    broken: Break, message: str, mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded()
    before = values(model)
    broken(monkeypatch)
    with pytest.raises(
        RunFailed, match=rf"^privacy self-test: {message}.*, nothing was trained(; try .+ slower)?$"
    ):
        check(model, mechanism)
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
