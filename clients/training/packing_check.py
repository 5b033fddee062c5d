"""Do examples in one row leave each other alone on this model? Asked before training, as errors are silent.

It follows from the model's own attention and positions, not from a list of models.
"""

from __future__ import annotations

import torch

from clients.training.made_up import EXAMPLES, one_by_one, prepared, synthetic_examples
from clients.training.self_check import negligible, tolerance_of
from clients.training.train import batch_loss
from fedlora.data.packing import collate_packed
from fedlora.errors import ConfigError, named_line
from fedlora.models import AdaptedModel


def check_packing(model: AdaptedModel, pad_token_id: int) -> None:
    """Compare the losses and the gradient of made-up examples in one row with those of single examples.

    Args:
        model: loaded, so that it is known what is trained; it stays as it is.
        pad_token_id: fills up a row.

    Raises:
        ConfigError: they differ, or the model cannot be asked.
    """
    trained = model.trainable()
    shapes = tuple((name, tuple(p.shape)) for name, p in {**trained.factors, **trained.head}.items())
    if ("packing", shapes) in model.passed or not shapes:
        return
    examples = synthetic_examples(model, pad_token_id)
    row = collate_packed(examples, EXAMPLES, pad_token_id, int(examples.lengths.sum()) + 1)
    try:
        with model.computing(torch.float32), prepared(model) as named:
            alone = one_by_one(model, named, examples, pad_token_id)
            loss = batch_loss(model, {name: part.to(model.device) for name, part in row.items()})
            found = torch.autograd.grad(loss, list(named.values()))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise _refused(f"the model cannot compute it ({named_line(error)})") from None
    for name, gradient, gradients in zip(named, found, alone, strict=True):
        if not negligible(gradient - gradients.mean(dim=0), gradients, tolerance_of(model)):
            raise _refused(f"the gradient of {name} is not that of single examples")
    model.passed.add(("packing", shapes))


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"train.packing = true: {reason}, must be false with this model")
