"""DP-SGD: without noise and clipping it is SGD; with them the bound and the noise are what was promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

from clients.training import dp_sgd, dp_step, opacus_parts
from clients.training.train import batch_loss, train_local
from fedlora.config import TrainConfig
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from tests.clients.measures import distance, same_bits, tensors, traces, values
from tests.clients.samples import PAD, everyone, examples, loaded, reload, train_by_dp_sgd

DATA = examples()
ALL = everyone(DATA)
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}
HOWS: list[dict[str, Any]] = [
    {},
    {"grad_sample_mode": "ghost"},
    {"clipping": "per-layer"},
    {"max_physical_batch_size": 3},
    {"max_physical_batch_size": 3, "grad_sample_mode": "ghost"},
]
"""The ways to clip, the first being the default."""
every_how = pytest.mark.parametrize("how", HOWS, ids=lambda how: "-".join(map(str, how.values())) or "hooks")


def train(
    model: AdaptedModel,
    *,
    noise: float = 0.0,
    clip: float = 1e6,
    local_steps: int = 3,
    seed: int = 1,
    indices: Any = ALL,
    how: dict[str, Any] | None = None,
    secure: bool = False,
    release_loss: bool = False,
    **config: Any,
) -> Any:
    return train_by_dp_sgd(
        model,
        DATA,
        indices,
        PAD,
        TrainConfig(**config),
        local_steps=local_steps,
        noise_multiplier=noise,
        max_grad_norm=clip,
        seed=seed,
        **(how or {}),
        secure=secure,
        release_loss=release_loss,
    )


@pytest.mark.parametrize(("trained", "pooling"), [("AB", "mean"), ("A", "model"), ("B", "model")])
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
@pytest.mark.parametrize("how", HOWS[:3], ids=["hooks", "ghost", "per-layer"])
def test_huge_clip_and_no_noise_is_plain_training(
    how: dict[str, Any], config: Any, trained: str, pooling: str
) -> None:
    """At a sample rate of 1 both trainers see every example in every step."""
    model = loaded(trained=frozenset(trained), pooling=pooling)
    ours = train(model, batch_size=24, how=how, **config)
    reload(model, trained=frozenset(trained))
    plain = train_local(model, DATA, ALL, PAD, TrainConfig(batch_size=24, **config), local_steps=3, seed=1)
    start = values(loaded(pooling=pooling))
    for name, tensor in tensors(plain).items():
        change, wanted = tensors(ours)[name] - start[name], tensor - start[name]
        torch.testing.assert_close(change, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()) + 1e-7)


@every_how
@pytest.mark.parametrize("clip", [0.01, 0.1, 1.0])
def test_no_example_moves_the_model_further_than_the_bound(clip: float, how: dict[str, Any]) -> None:
    """Over all trained tensors together, head included."""
    start = values(loaded())
    lengths = []
    model = loaded()
    for i in range(6):
        reload(model)
        result = train(model, clip=clip, indices=ALL[i : i + 1], how=how, batch_size=1, local_steps=1, **SGD)
        lengths.append(distance(tensors(result), start) / 0.1)
    assert max(lengths) <= clip * (1 + 1e-4)
    if clip == 0.01 and how.get("clipping") != "per-layer":
        assert min(lengths) == pytest.approx(clip, rel=1e-3)


@every_how
@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_has_the_promised_size(secure: bool, how: dict[str, Any]) -> None:
    """Std = noise_multiplier max_grad_norm / expected batch size, on every trained tensor."""
    noise, clip, batch_size = 3.0, 0.5, 2
    config = {**SGD, "learning_rate": 1.0}
    model = loaded(rank=16)
    chosen: dict[str, Any] = {"batch_size": batch_size, "secure": secure, "how": how, **config}
    noisy = tensors(train(model, noise=noise, clip=clip, local_steps=1, **chosen))
    start = values(loaded(rank=16))
    std = noise * clip / batch_size
    changes = torch.cat([(noisy[name] - start[name]).flatten() for name in start])
    assert changes.numel() > 4000
    data_moves_at_most = clip * 24 / batch_size / changes.numel() ** 0.5
    assert float(changes.std()) == pytest.approx(std, rel=0.04 + data_moves_at_most / std)
    assert float(changes.mean().abs()) < 0.05 * std + data_moves_at_most
    assert (changes.abs() > 2 * std).float().mean() == pytest.approx(0.0455, abs=0.015)


@every_how
@pytest.mark.parametrize("secure", [False, True])
def test_an_empty_draw_is_a_step_of_noise_alone(
    secure: bool, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dp_sgd, "poisson_batches", lambda indices, rate, steps, rng: [indices[:0]] * steps)
    monkeypatch.setattr(dp_sgd, "check_drawn", lambda sizes, examples, rate: None)  # it would find that
    chosen: dict[str, Any] = {**SGD, "learning_rate": 1.0, "secure": secure, "how": how}
    model = loaded(rank=16)
    result = train(model, noise=2.0, clip=0.5, local_steps=4, batch_size=8, **chosen)
    start = values(loaded(rank=16))
    changes = torch.cat([(tensors(result)[name] - start[name]).flatten() for name in start])
    assert result.steps == 4
    assert float(changes.std()) == pytest.approx(4**0.5 * 2.0 * 0.5 / 8, rel=0.05)
    assert (changes != 0).float().mean() > 0.99  # a sum of numbers on the grid is zero now and then


@every_how
def test_noise_falls_on_exactly_what_is_trained(how: dict[str, Any]) -> None:
    model = loaded(trained=frozenset("B"), train_head=False)
    before = values(model)
    train(model, noise=1.0, how=how)
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


@every_how
def test_secure_training_ignores_the_seed(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the noise nor the draw can be repeated by somebody who knows the seed."""
    draws: list[list[int]] = []
    real = dp_sgd.poisson_batches

    def recorded(*arguments: Any) -> Any:
        for drawn in real(*arguments):
            draws[-1].extend(map(int, drawn))
            yield drawn

    monkeypatch.setattr(dp_sgd, "poisson_batches", recorded)
    results = []
    for _ in range(2):
        draws.append([])
        torch.manual_seed(0)
        results.append(train(loaded(), noise=1.0, secure=True, local_steps=4, how=how))
    assert not same_bits(*results)
    assert draws[0] != draws[1]


@every_how
def test_secure_noise_comes_from_the_operating_system(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal batches and equal seeds for everything else, and still two different results."""
    monkeypatch.setattr(dp_sgd.secrets, "randbits", lambda _: 5)
    chosen: dict[str, Any] = {"secure": True, "batch_size": 24, "how": how}
    assert not same_bits(*(train(loaded(), noise=1.0, **chosen) for _ in range(2)))
    assert same_bits(*(train(loaded(), noise=0.0, **chosen) for _ in range(2)))


def test_secure_noise_has_more_entropy_than_a_torch_seed() -> None:
    """Torch's CPU generator keeps 32 bits of its seed: the reason why it draws no secure noise."""
    one, other = (torch.randn(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert torch.equal(one, other)
    shape = torch.Size((50_000,))
    drawn = opacus_parts.system_normal(shape)
    assert drawn.dtype == torch.float64
    assert torch.isfinite(drawn).all()
    assert float(drawn.std()) == pytest.approx(1.0, rel=0.02)
    assert not torch.equal(drawn, opacus_parts.system_normal(shape))


@every_how
def test_the_resident_model_is_clean_afterwards(how: dict[str, Any]) -> None:
    model = loaded()
    plain = train_local(model, DATA, ALL, PAD, TrainConfig(), local_steps=2, seed=1)
    for _ in range(2):
        reload(model)
        train(model, noise=1.0, how=how)
        assert traces(model) == []
    reload(model)
    assert same_bits(plain, train_local(model, DATA, ALL, PAD, TrainConfig(), local_steps=2, seed=1))


@pytest.mark.parametrize(
    ("how", "samplers"),
    [({}, GradSampleModule.GRAD_SAMPLERS), (HOWS[1], GradSampleModuleFastGradientClipping.NORM_SAMPLERS)],
    ids=["hooks", "ghost"],
)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failing_step_leaves_the_model_clean_too(
    where: str, how: dict[str, Any], samplers: dict[type, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded()
    clean = train(model, noise=1.0, how=how)
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
        monkeypatch.setattr(dp_step, "batch_loss", failing(batch_loss))
    else:
        monkeypatch.setitem(samplers, torch.nn.Linear, failing(samplers[torch.nn.Linear]))
    with pytest.raises(MemoryError):
        train(model, noise=1.0, local_steps=20, how=how)
    assert traces(model) == []
    monkeypatch.undo()
    reload(model)
    assert same_bits(clean, train(model, noise=1.0, how=how))


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
