"""``train.precision`` and ``evaluation-precision``: passes in half precision, what is trained in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.evaluation import evaluate
from clients.training.train import LocalResult, batch_loss, train_local
from fedlora.config import TrainConfig, from_flat
from fedlora.data.examples import collate
from fedlora.errors import ConfigError
from fedlora.models import packed_linear
from fedlora.server.validate import check
from tests.clients.cohort.samples import assert_same, member, task
from tests.clients.samples import BOTH, examples
from tests.models.samples import adapted, random_adapters

DATA = examples(24)


def trained(precision: torch.dtype) -> LocalResult:
    model = adapted()
    model.precision = precision
    model.load(random_adapters(model.modules, 4), {}, trained=BOTH, train_head=True)
    config = TrainConfig(optimizer="sgd", learning_rate=0.1, batch_size=8)
    return train_local(model, DATA, np.arange(24), 0, config, local_steps=3, seed=1)


def test_near_to_float32_and_kept_in_float32() -> None:
    half, whole = trained(torch.bfloat16), trained(torch.float32)
    assert half.loss == pytest.approx(whole.loss, rel=0.02)
    start = random_adapters(adapted().modules, 4)
    for name, factors in half.adapters.items():
        wanted = whole.adapters[name]
        for letter, tensor in factors.tensors().items():
            assert tensor.dtype == torch.float32
            moved = wanted.tensors()[letter] - start[name].tensors()[letter]
            assert 0 < float((tensor - wanted.tensors()[letter]).norm()) < 0.2 * float(moved.norm())


def test_the_activations_are_half_precision() -> None:
    model, seen = adapted(), []
    model.precision = torch.bfloat16
    model.load(random_adapters(model.modules, 4), {}, trained=BOTH, train_head=True)
    layer = model.module.get_submodule(next(iter(model.modules)))
    layer.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    loss = batch_loss(model, collate(DATA, range(4), 0))
    assert (seen, loss.dtype) == ([torch.bfloat16], torch.float32)


def test_a_cohort_follows_one_by_one() -> None:
    model = adapted()
    model.precision = torch.bfloat16
    members = [member(model, 0, steps=2), member(model, 1, rank=2, steps=3)]
    assert_same(model, members, task(optimizer="sgd", learning_rate=0.1), tolerance=0.02)


def test_private_training_is_in_float32() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision = 'bfloat16': must be 'float32' in private"):
        check(from_flat({"train.precision": "bfloat16", "privacy.mode": "example"}))
    check(from_flat({"train.precision": "bfloat16"}))


def test_evaluation_in_half_precision_is_near_and_leaves_the_model_as_it_was() -> None:
    """Packed or not, whatever the training is in."""
    for packs in (True, False):
        model, given = adapted(), (DATA, np.arange(24), 0)
        model.load(random_adapters(model.modules, 4), {})
        with pytest.MonkeyPatch.context() as patched:
            if not packs:
                patched.setattr(packed_linear, "MOST_BYTES", 0)
            whole, half = (evaluate(model, *given, precision=p) for p in ("float32", "bfloat16"))
            model.precision = torch.bfloat16
            again = [evaluate(model, *given, precision=p).losses for p in ("float32", "bfloat16")]
        assert 0 < np.abs(half.losses - whole.losses).max() < 0.02
        assert [found.tobytes() for found in again] == [whole.losses.tobytes(), half.losses.tobytes()]
        assert model.precision == torch.bfloat16
        assert not any("forward" in vars(layer) for layer in model.frozen.values())


def test_where_half_precision_is_emulated_evaluation_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed_linear._tell.cache_clear()
    model = adapted()
    for there in (True, False, False):
        monkeypatch.setattr(packed_linear, "has_onednn", lambda precision, there=there: there)
        for precision in ("float32", "bfloat16"):
            packed_linear.tell_if_emulated(model, precision)
        assert len(caplog.records) == int(not there)
    assert "evaluation-precision = 'bfloat16': emulated on this processor" in caplog.text


def test_preference_pairs_are_evaluated_in_float32() -> None:
    with pytest.raises(ConfigError, match=r"^evaluation-precision = 'bfloat16': must be 'float32' with task"):
        from_flat({"task": "dpo", "evaluation-precision": "bfloat16"})
