"""DP-SGD: without noise and clipping it is SGD; with them the bound and the noise are what was promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer

from clients import private
from clients.batches import load_batch, poisson_batches
from clients.private import per_example_gradients, train_private
from clients.self_test import self_test
from clients.training import batch_loss, train_local
from fedlora.config import TrainConfig
from fedlora.errors import ConfigError, RunFailed
from fedlora.models import AdaptedModel
from fedlora.seeding import stream
from tests.clients.measures import distance, same_bits, tensors, values
from tests.clients.samples import PAD, everyone, examples, loaded, reload

DATA = examples()
ALL = everyone(DATA)
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}


def train(
    model: AdaptedModel,
    *,
    noise: float = 0.0,
    clip: float = 1e6,
    local_steps: int = 3,
    seed: int = 1,
    indices: Any = ALL,
    secure: bool = False,
    release_loss: bool = False,
    **config: Any,
) -> Any:
    return train_private(
        model,
        DATA,
        indices,
        PAD,
        TrainConfig(**config),
        local_steps=local_steps,
        noise_multiplier=noise,
        max_grad_norm=clip,
        seed=seed,
        secure=secure,
        release_loss=release_loss,
    )


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("trains", [frozenset("AB"), frozenset("A"), frozenset("B")])
@pytest.mark.parametrize(
    "config",
    [
        SGD,
        {**SGD, "momentum": 0.9, "weight_decay": 0.1, "head_learning_rate": 0.5},
        {**SGD, "proximal_mu": 2.0},
        {"learning_rate": 1e-3, "weight_decay": 0.1},
    ],
    ids=["sgd", "sgd-full", "fedprox", "adamw"],
)
def test_huge_clip_and_no_noise_is_plain_training(config: Any, trains: frozenset[str], pooling: str) -> None:
    """At a sample rate of 1 both trainers see every example in every step."""
    model = loaded(trains=trains, pooling=pooling)
    ours = train(model, batch_size=24, **config)
    reload(model, trains=trains)
    plain = train_local(model, DATA, ALL, PAD, TrainConfig(batch_size=24, **config), local_steps=3, seed=1)
    start = values(loaded(pooling=pooling))
    for name, tensor in tensors(plain).items():
        change, wanted = tensors(ours)[name] - start[name], tensor - start[name]
        torch.testing.assert_close(change, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()) + 1e-7)


def test_per_example_gradients_equal_a_loop_over_single_examples() -> None:
    model = loaded(rank=3)
    with model.training() as trained:
        alone = [
            torch.autograd.grad(
                batch_loss(model, load_batch(DATA, ALL[i : i + 1], PAD, model.device)), trained.all
            )
            for i in range(6)
        ]
        with per_example_gradients(model.module):
            batch_loss(model, load_batch(DATA, ALL[:6], PAD, model.device), reduction="sum").backward()
            for number, parameter in enumerate(trained.all):
                wanted = torch.stack([gradients[number] for gradients in alone])
                torch.testing.assert_close(parameter.grad_sample, wanted, rtol=1e-4, atol=1e-7)


def test_each_step_is_the_clipped_sum_over_the_expected_batch_size() -> None:
    """Algorithm 1 of Abadi et al. written out, on batches whose size differs from the expected one."""
    clip, steps, expected = 0.3, 5, 6
    model = loaded()
    ours = tensors(train(model, clip=clip, local_steps=steps, batch_size=expected, **SGD))
    reload(model)
    sizes = []
    with model.training() as trained:
        for drawn in poisson_batches(ALL, expected / len(ALL), steps, stream(1, "poisson")):
            sizes.append(len(drawn))
            total = [torch.zeros_like(p) for p in trained.all]
            for i in drawn:
                batch = load_batch(DATA, ALL[[i]], PAD, model.device)
                g = torch.autograd.grad(batch_loss(model, batch), trained.all)
                norm = float(torch.stack([x.square().sum() for x in g]).sum().sqrt())
                total = [t + x * min(1.0, clip / norm) for t, x in zip(total, g, strict=True)]
            with torch.no_grad():
                for parameter, t in zip(trained.all, total, strict=True):
                    parameter -= 0.1 * t / expected
    assert len(set(sizes)) > 1
    for name, tensor in values(model).items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.01, 0.1, 1.0])
def test_no_example_moves_the_model_further_than_the_bound(clip: float) -> None:
    """Over all trained tensors together, head included."""
    start = values(loaded())
    lengths = []
    for i in range(6):
        result = train(loaded(), clip=clip, indices=ALL[i : i + 1], batch_size=1, local_steps=1, **SGD)
        lengths.append(distance(tensors(result), start) / 0.1)
    assert max(lengths) <= clip * (1 + 1e-4)
    if clip == 0.01:
        assert min(lengths) == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_has_the_promised_size(secure: bool) -> None:
    """Std = noise_multiplier max_grad_norm / expected batch size, on every trained tensor."""
    noise, clip, batch_size = 3.0, 0.5, 2
    config = {**SGD, "learning_rate": 1.0}
    model = loaded(rank=16)
    noisy = tensors(
        train(model, noise=noise, clip=clip, local_steps=1, batch_size=batch_size, secure=secure, **config)
    )
    start = values(loaded(rank=16))
    std = noise * clip / batch_size
    changes = torch.cat([(noisy[name] - start[name]).flatten() for name in start])
    assert changes.numel() > 4000
    data_moves_at_most = clip * 24 / batch_size / changes.numel() ** 0.5
    assert float(changes.std()) == pytest.approx(std, rel=0.04 + data_moves_at_most / std)
    assert float(changes.mean().abs()) < 0.05 * std + data_moves_at_most
    assert (changes.abs() > 2 * std).float().mean() == pytest.approx(0.0455, abs=0.015)


@pytest.mark.parametrize("secure", [False, True])
def test_an_empty_draw_is_a_step_of_noise_alone(secure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "poisson_batches", lambda indices, rate, steps, rng: [indices[:0]] * steps)
    config = {**SGD, "learning_rate": 1.0}
    model = loaded(rank=16)
    result = train(model, noise=2.0, clip=0.5, local_steps=4, batch_size=8, secure=secure, **config)
    start = values(loaded(rank=16))
    changes = torch.cat([(tensors(result)[name] - start[name]).flatten() for name in start])
    assert result.steps == 4
    assert float(changes.std()) == pytest.approx(4**0.5 * 2.0 * 0.5 / 8, rel=0.05)
    assert (changes != 0).all()


def test_noise_falls_on_exactly_what_is_trained() -> None:
    model = loaded(trains=frozenset("B"), train_head=False)
    before = values(model)
    train(model, noise=1.0)
    changed = {name for name, t in values(model).items() if not torch.equal(t, before[name])}
    assert changed == {f"{name}.B" for name in model.modules}


def test_simulation_is_reproducible_and_seeds_differ() -> None:
    model = loaded(dropout=0.1)
    results = []
    for seed in (1, 1, 2):
        reload(model, dropout=0.1)
        results.append(train(model, noise=1.0, seed=seed))
    assert same_bits(results[0], results[1])
    assert not same_bits(results[0], results[2])


def test_the_noise_depends_on_the_seed() -> None:
    """With every example in every batch and no dropout, nothing else does."""
    one, other = (train(loaded(), noise=1.0, batch_size=24, seed=s) for s in (1, 2))
    assert distance(tensors(one), tensors(other)) > 1e-3


def test_secure_training_ignores_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the noise nor the draw can be repeated by somebody who knows the seed."""
    draws: list[list[int]] = []
    real = private.poisson_batches

    def recorded(*arguments: Any) -> Any:
        for drawn in real(*arguments):
            draws[-1].extend(map(int, drawn))
            yield drawn

    monkeypatch.setattr(private, "poisson_batches", recorded)
    results = []
    for _ in range(2):
        draws.append([])
        torch.manual_seed(0)
        results.append(train(loaded(), noise=1.0, secure=True, local_steps=4))
    assert not same_bits(*results)
    assert draws[0] != draws[1]


def test_secure_noise_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal seeds for everything else, and still two different results."""
    monkeypatch.setattr(private.secrets, "randbits", lambda _: 5)
    assert not same_bits(*(train(loaded(), noise=1.0, secure=True) for _ in range(2)))
    assert same_bits(*(train(loaded(), noise=0.0, secure=True) for _ in range(2)))


def test_secure_noise_has_more_entropy_than_a_torch_seed() -> None:
    """Torch's CPU generator keeps 32 bits of its seed: the reason why it draws no secure noise."""
    one, other = (torch.randn(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert torch.equal(one, other)
    shape = torch.Size((50_000,))
    drawn = private.system_normal(shape)
    assert drawn.dtype == torch.float64
    assert torch.isfinite(drawn).all()
    assert float(drawn.std()) == pytest.approx(1.0, rel=0.02)
    assert not torch.equal(drawn, private.system_normal(shape))


def traces(model: AdaptedModel) -> list[str]:
    """What Opacus may have left on the model."""
    found = [
        f"{name}: hooks"
        for name, m in model.module.named_modules()
        if m._forward_hooks or m._backward_hooks or m._forward_pre_hooks
    ]
    found += [
        f"{name}: {a}"
        for name, m in model.module.named_modules()
        for a in ("activations", "max_batch_len")
        if hasattr(m, a)
    ]
    found += [f"{name}: {a}" for name, p in model.module.named_parameters() for a in vars(p)]
    return found + [name for name, p in model.module.named_parameters() if p.grad is not None]


def test_the_resident_model_is_clean_afterwards() -> None:
    model = loaded()
    plain = train_local(model, DATA, ALL, PAD, TrainConfig(), local_steps=2, seed=1)
    for _ in range(2):
        reload(model)
        train(model, noise=1.0)
        assert traces(model) == []
    reload(model)
    assert same_bits(plain, train_local(model, DATA, ALL, PAD, TrainConfig(), local_steps=2, seed=1))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failing_step_leaves_the_model_clean_too(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded()
    clean = train(model, noise=1.0)
    linear = torch.nn.Linear
    sampler = GradSampleModule.GRAD_SAMPLERS[linear]
    calls: list[int] = []

    def failing(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            calls.append(1)
            if len(calls) == 7:
                raise MemoryError("out of memory")
            return result

        return call

    if where == "forward":
        monkeypatch.setattr(private, "batch_loss", failing(batch_loss))
    else:
        monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, linear, failing(sampler))
    with pytest.raises(MemoryError):
        train(model, noise=1.0, local_steps=20)
    assert traces(model) == []
    monkeypatch.undo()
    reload(model)
    assert same_bits(clean, train(model, noise=1.0))


def test_the_loss_stays_private_unless_released() -> None:
    assert train(loaded(), noise=1.0).loss is None
    assert 0 < train(loaded(), release_loss=True, learning_rate=1e-9, batch_size=24).loss < 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 25}, r"train\.batch-size = 25: private training needs at least as many examples"),
        ({"local_epochs": 2}, r"train\.local-epochs = 2: must be 0"),
        ({"max_grad_norm": 1.0}, r"train\.max-grad-norm = 1\.0: must be 0"),
    ],
)
def test_what_dp_sgd_does_not_cover_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(loaded(), **config)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("trains", [frozenset("AB"), frozenset("B")])
def test_the_self_test_passes_and_leaves_no_trace(trains: frozenset[str], dropout: float) -> None:
    model = loaded(trains=trains, dropout=dropout)
    before = values(model)
    self_test(model, DATA, ALL, PAD)
    assert all(torch.equal(t, before[name]) for name, t in values(model).items())
    assert traces(model) == []


def test_the_self_test_notices_wrong_per_example_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = GradSampleModule.GRAD_SAMPLERS[torch.nn.Linear]

    def mixed(*arguments: Any) -> Any:
        return {p: g.roll(1, dims=0) for p, g in sampler(*arguments).items()}

    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, torch.nn.Linear, mixed)
    model = loaded()
    before = values(model)
    with pytest.raises(RunFailed, match=r"privacy self-test: per-example gradients of \S+ are wrong"):
        self_test(model, DATA, ALL, PAD)
    assert all(torch.equal(t, before[name]) for name, t in values(model).items())


def test_the_self_test_notices_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPOptimizer, "scale_grad", lambda _: None)
    with pytest.raises(RunFailed, match=r"privacy self-test: the noise-free step of \S+ "):
        self_test(loaded(), DATA, ALL, PAD)
