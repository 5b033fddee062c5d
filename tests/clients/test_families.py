"""Each family of models, one by one, in cohorts and by DP-SGD: as transformers computes it, or refused.

One by one the loss and the gradient of every trained tensor are those of the network as transformers opened
it, with PEFT's adapter in it, fed by its own tokenizer. The self-tests then hold cohorts and
DP-SGD to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

from clients.training.batched.layers import why_alone
from clients.training.batched.self_check import check_cohort
from clients.training.batches import load_batch
from clients.training.dp_mechanism import Mechanism
from clients.training.self_check import check_steps
from clients.training.train import batch_loss
from fedlora.config import ModelConfig
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel, build_model, resolve_targets
from tests.models.families import CLASSIFIERS, LABELS, PAD, words
from tests.models.samples import random_adapters
from tests.tasks.test_pairs import encoded

Save = Callable[..., Path]
RANK = 2
TEXTS, PAIRS = words(3, 9, 5, 6), words(4, 2, 7, 6, seed=1)
HOOKS = Mechanism(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)
GHOST = Mechanism(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1, grad_sample_mode="ghost")
MIXES = "of this model mixes examples"
LAYER_NORM = "of the head head.norm is a LayerNorm), nothing was trained; try model.pooling = 'mean'"
TIED = "Parameter tying is not supported with Ghost Clipping), nothing was trained; try privacy"
REFUSED: dict[tuple[str, str], str] = {
    ("albert", "ghost"): TIED,
    ("modernbert", "hooks"): LAYER_NORM,
    ("modernbert", "ghost"): LAYER_NORM,
    ("deberta-v3", "cohort"): MIXES,  # its projections also see the positions, which all examples share
    ("deberta-v3", "private cohort"): MIXES,
    ("deberta-v3", "hooks"): "wrong on this model, nothing was trained",
    ("deberta-v3", "ghost"): TIED,
    ("xlnet", "cohort"): MIXES,  # tokens come before examples in its layers
    ("xlnet", "private cohort"): MIXES,
    ("xlnet", "hooks"): "expected (4, 2, 16), nothing was trained",
    ("xlnet", "ghost"): "Opacus cannot take the gradient of each example",
}
"""Why a family cannot train so; all others can."""
ALONE = {"modernbert": "the head's head.norm is a LayerNorm"}
"""Why a family's clients never train together."""


def adapted(model: Path) -> AdaptedModel:
    module = build_model(ModelConfig(name=str(model), pooling="model"), LABELS, 0)
    made = AdaptedModel(module, resolve_targets(module, "all-linear"))
    made.load(random_adapters(made.modules, RANK), {}, trained=frozenset("AB"), train_head=True)
    return made


def theirs(model: Path, ours: AdaptedModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by transformers and PEFT alone."""
    network: Any = tf.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=list(ours.modules), fan_in_fan_out=ours.fan_in_fan_out
    )
    network = peft.get_peft_model(network, config).eval()
    named = dict(network.named_parameters())
    known = {}
    for name, factors in random_adapters(ours.modules, RANK).items():
        for letter, value in factors.tensors().items():
            known[f"{name}.{letter}"] = named[f"base_model.model.{name}.lora_{letter}.default.weight"]
            known[f"{name}.{letter}"].data.copy_(value)
    known |= {name: named[f"base_model.model.{name}"] for name in ours.initial_head}
    for parameter in known.values():
        parameter.requires_grad_(True)
    batch = tf.AutoTokenizer.from_pretrained(model)(TEXTS, PAIRS, padding=True, return_tensors="pt")
    labels = torch.tensor([0, 1, 0, 1])
    loss = torch.nn.functional.cross_entropy(network(**batch).logits, labels)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in known.items()}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_training_step_is_that_of_transformers_and_peft(family: str, saved: Save) -> None:
    model = adapted(saved(family))
    examples = encoded(saved(family), TEXTS, PAIRS)
    wanted_loss, wanted = theirs(saved(family), model)
    with model.training() as trained:
        loss = batch_loss(model, load_batch(examples, range(4), PAD, model.device))
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad for name, p in {**trained.factors, **trained.head}.items()}
        assert float(loss) == pytest.approx(wanted_loss, abs=1e-5)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            if gradient is None:
                assert found[name] is None
            else:
                torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_cohorts(family: str, saved: Save) -> None:
    model = adapted(saved(family))
    assert why_alone(model).startswith(ALONE.get(family, ""))
    assert bool(why_alone(model)) == (family in ALONE)
    if family not in ALONE:
        expect(family, "cohort", lambda: check_cohort(model, PAD, None))
        expect(family, "private cohort", lambda: check_cohort(model, PAD, HOOKS))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_private_steps(family: str, mode: str, saved: Save) -> None:
    model = adapted(saved(family))
    expect(family, mode, lambda: check_steps(model, PAD, HOOKS if mode == "hooks" else GHOST))


def expect(family: str, way: str, act: Callable[[], object]) -> None:
    """It passes; or it is refused in one line for the reason that is written down."""
    reason = REFUSED.get((family, way))
    if reason is None:
        act()
        return
    with pytest.raises(RunFailed) as error:
        act()
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
