"""All ways to clip are one sum: that of a loop over single examples, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers import get_optimizer_class
from torch import Tensor

from clients.training import dp_step
from clients.training.batched.private import ClippedSums
from clients.training.batches import load_batch, physical_batches, poisson_batches
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_step import private_steps
from clients.training.train import batch_loss
from fedlora.config import PrivacyConfig, TrainConfig
from fedlora.core.seeding import stream
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from tests.clients.samples import PAD, everyone, examples, loaded, train_by_dp_sgd

DATA = examples()
ALL = everyone(DATA)
CLIP, STEPS, EXPECTED = 2.8, 5, 6
WAYS = [("hooks", "flat"), ("ghost", "flat"), ("hooks", "per-layer")]


def doubled(**keys: Any) -> AdaptedModel:
    model = loaded(**keys)
    model.module.double()
    return model


def trained(model: AdaptedModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.trainable().all]


def close(ours: list[Tensor], others: list[Tensor], tolerance: float = 1e-9) -> bool:
    scale = max(float(t.abs().max()) for t in others)
    return max(float((a - b).abs().max()) for a, b in zip(ours, others, strict=True)) <= tolerance * scale


def train(model: AdaptedModel, mode: str, clipping: str, most: int = 0) -> list[Tensor]:
    train_by_dp_sgd(
        model,
        DATA,
        ALL,
        PAD,
        TrainConfig(optimizer="sgd", learning_rate=0.1, batch_size=EXPECTED),
        local_steps=STEPS,
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        seed=1,
        grad_sample_mode=mode,
        clipping=clipping,
        max_physical_batch_size=most,
    )
    return trained(model)


def naive(model: AdaptedModel, clipping: str) -> tuple[list[Tensor], list[int], list[float]]:
    """Algorithm 1 of Abadi et al. written out; also the sizes of the batches and every clipping factor.

    Opacus adds 1e-6 to each norm. ``per-layer`` holds each of the L tensors to C / sqrt(L).
    """
    sizes, factors = [], []
    with model.training() as trainable:
        for drawn in poisson_batches(ALL, EXPECTED / len(ALL), STEPS, stream(1, "poisson")):
            sizes.append(len(drawn))
            total = [torch.zeros_like(p) for p in trainable.all]
            for i in drawn:
                batch = load_batch(DATA, ALL[[i]], PAD, model.device)
                g = torch.autograd.grad(batch_loss(model, batch), trainable.all)
                if clipping == "per-layer":
                    share = [min(1.0, CLIP / len(g) ** 0.5 / (float(x.norm()) + 1e-6)) for x in g]
                else:
                    norm = sum(float(x.square().sum()) for x in g) ** 0.5
                    share = [min(1.0, CLIP / (norm + 1e-6))] * len(g)
                factors += share
                total = [t + s * x for t, s, x in zip(total, share, g, strict=True)]
            with torch.no_grad():
                for parameter, t in zip(trainable.all, total, strict=True):
                    parameter -= 0.1 * t / EXPECTED
    return trained(model), sizes, factors


@pytest.mark.parametrize("most", [0, 1, 4])
@pytest.mark.parametrize("trained", [frozenset("AB"), frozenset("B")])
@pytest.mark.parametrize(("mode", "clipping"), WAYS)
def test_each_step_is_the_clipped_sum_over_the_expected_batch_size(
    mode: str, clipping: str, trained: frozenset[str], most: int
) -> None:
    """On batches whose size differs from the expected one; some examples are clipped, some are not."""
    wanted, sizes, factors = naive(doubled(trained=trained), clipping)
    assert len(set(sizes)) > 1
    assert 0 < sum(f < 1 for f in factors) < len(factors)
    assert close(train(doubled(trained=trained), mode, clipping, most), wanted)


def test_per_layer_clipping_is_another_mechanism() -> None:
    """So that the comparison above means something."""
    assert not close(train(doubled(), "hooks", "per-layer"), train(doubled(), "hooks", "flat"), 1e-3)


@pytest.mark.parametrize(("mode", "clipping"), WAYS)
def test_chunks_do_not_change_what_is_drawn_or_added(
    mode: str, clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed, noise and all; never more examples in memory than allowed."""
    sizes: list[int] = []

    def recorded(*arguments: Any) -> Any:
        sizes.append(len(arguments[1]))
        return load_batch(*arguments)

    monkeypatch.setattr(dp_step, "load_batch", recorded)
    results = []
    for most in (0, 2):
        model = doubled()
        settings = Mechanism(
            noise_multiplier=1.0,
            max_grad_norm=CLIP,
            expected_batch_size=EXPECTED,
            clipping=clipping,
            grad_sample_mode=mode,
            max_physical_batch_size=most,
        )
        sizes.clear()
        with model.training() as trainable:
            sgd = torch.optim.SGD(trainable.all, lr=0.1)
            noise = torch.Generator().manual_seed(3)
            with private_steps(model, sgd, settings, noise) as private:
                for drawn in (ALL[:7], ALL[:0], ALL[7:9], ALL[3:12]):
                    private.step(DATA, drawn, PAD)
        results.append(trained(model))
        assert max(sizes) == (most or 9)
    assert close(*results)


def test_physical_batches_keep_every_example_and_the_order() -> None:
    for count in range(9):
        for most in range(5):
            chunks = physical_batches(np.arange(count), most)
            assert np.concatenate(chunks).tolist() == list(range(count))
            assert all(len(chunk) <= (most or count) for chunk in chunks)
            assert len(chunks) == 1 or all(len(chunk) for chunk in chunks)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_we_refuse_the_pairs_that_opacus_refuses(mode: str, clipping: str) -> None:
    try:
        get_optimizer_class(clipping.replace("-", "_"), distributed=False, grad_sample_mode=mode)
    except ValueError:
        with pytest.raises(ConfigError, match=r'privacy\.clipping = \'per-layer\': must be "flat" where'):
            PrivacyConfig(grad_sample_mode=mode, clipping=clipping)
    else:
        PrivacyConfig(grad_sample_mode=mode, clipping=clipping)
        assert (mode, clipping) in WAYS


@pytest.mark.parametrize(
    ("key", "value"), [("clipping", "automatic"), ("grad_sample_mode", "ew"), ("max_physical_batch_size", -1)]
)
def test_unknown_ways_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"privacy\.{key.replace('_', '-')} = "):
        PrivacyConfig(**{key: value})


@pytest.mark.parametrize("factor", [math.inf, 1e307])
@pytest.mark.parametrize(("mode", "clipping"), [*WAYS, ("loop", "flat")])
def test_an_example_that_overflows_counts_as_zero(
    mode: str, clipping: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping would make NaN of it, which shows in all that is released that it was drawn."""
    drawn, bad = np.arange(5), 2

    def step(chosen: np.ndarray[Any, Any], overflows: bool) -> list[Tensor]:
        model = doubled()
        tokens = load_batch(DATA, drawn[bad : bad + 1], PAD, model.device)["input_ids"][0]

        def loss(model: AdaptedModel, batch: dict[str, Tensor], reduction: str = "mean") -> Tensor:
            losses, ids = batch_loss(model, batch, reduction), batch["input_ids"]
            marked = (ids[:, : len(tokens)] == tokens[: ids.shape[1]]).all(dim=1)
            return losses * torch.where(marked & overflows, torch.tensor(factor, dtype=losses.dtype), 1.0)

        monkeypatch.setattr(dp_step, "batch_loss", loss)
        mechanism = Mechanism(
            noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=EXPECTED, clipping=clipping,
            grad_sample_mode=mode,
        )  # fmt: skip
        with model.training() as values:
            optimizer = torch.optim.SGD(values.all, lr=0.1)
            with private_steps(model, optimizer, mechanism, torch.Generator()) as private:
                private.step(DATA, chosen, PAD)
        return trained(model)

    assert close(step(drawn, True), step(np.delete(drawn, bad), False))
    assert not close(step(drawn, False), step(np.delete(drawn, bad), False))


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e300])
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_an_example_that_overflows_counts_as_zero_in_a_cohort(bad: float, clipping: str) -> None:
    stacks: Any = SimpleNamespace(
        trained=["A", "B"], device=torch.device("cpu"), dtype=torch.float64, members=["m", "n"],
        values={"A": torch.zeros(2, 3, dtype=torch.float64), "B": torch.zeros(2, 4, dtype=torch.float64)},
        trained_by=lambda member: ["A", "B"], holding=lambda name, active: None,
    )  # fmt: skip
    mechanism = Mechanism(
        noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=EXPECTED, clipping=clipping
    )
    rows = {"A": torch.randn(5, 3, dtype=torch.float64), "B": torch.randn(5, 4, dtype=torch.float64)}
    clients, others = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 3, 4])
    rows["B"][2, 1] = bad
    one, wanted = (ClippedSums(stacks, [mechanism, mechanism]) for _ in range(2))
    one.add(rows, clients)
    wanted.add({name: row[others] for name, row in rows.items()}, clients[others])
    for name in stacks.trained:
        torch.testing.assert_close(one.sums[name], wanted.sums[name])
