"""One private step by the parts of Opacus: clip each example, sum, add noise, let the optimiser move.

Three ways to the same clipped sum (``grad_sample_mode``):

* ``hooks``: a backward pass keeps every example's gradient of every trained tensor, then clips it;
* ``ghost``: a first backward pass finds the norms alone, a second one weighs each example's loss by its
  clipping factor (Lee and Kifer, PoPETs 2021; Li et al., ICLR 2022);
* ``loop``: one backward pass for each example, for adapters of which Opacus' hooks see nothing.

Opacus is imported by the first private step, not by every process that might take one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clients.training.batches import Indices, load_batch, physical_batches
from clients.training.canaries import Rows, add_clipped, add_rows
from clients.training.dp_mechanism import Mechanism
from clients.training.followed_norm import followed
from clients.training.opacus_parts import private_optimizer, watched_model
from clients.training.train import batch_loss
from clients.training.units import Units, as_examples, join_at, shares
from fedlora.data.examples import Examples
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer

Weights = np.ndarray[Any, np.dtype[np.float32]]


class PrivateSteps:
    """Private steps of one model and optimiser; made by `private_steps`.

    Attributes:
        optimizer: Opacus' optimiser around the given one.
        norm: C, where it goes on from step to step.
        resting: tensors that the next step leaves, of which nothing counts; their noise is to be dropped.
    """

    def __init__(
        self,
        model: AdaptedModel,
        watched: Any,
        optimizer: DPOptimizer,
        mechanism: Mechanism,
        canaries: Rows | None = None,
        units: Units | None = None,
        counts: torch.Generator | None = None,
    ):
        self.optimizer = optimizer
        self.norm = followed(mechanism, counts)
        self.resting: Sequence[Any] = ()
        self._model = model
        self._watched = watched
        self._mechanism = mechanism
        self._canaries = canaries
        self._units = units

    def step(self, examples: Examples, drawn: Indices, pad_token_id: int) -> Tensor:
        """Move by the noisy clipped sum over the drawn examples or units; none of them is noise alone.

        Returns their summed loss, of units the sum of means, detached, which is not private.
        """
        total = torch.zeros((), device=self._model.device)
        chunks = physical_batches(drawn, at_once(self._mechanism))
        for number, chunk in enumerate(chunks, start=1):
            self.optimizer.zero_grad()  # keeps the sum over the chunks before
            total += self.backward(examples, chunk, pad_token_id)
            for parameter in self.resting:
                parameter.grad_sample = torch.zeros_like(parameter.grad_sample)
            if self.norm is not None:
                self.optimizer.max_grad_norm = self.norm.value
                gradients = [g.flatten(1) for g in self.optimizer.grad_samples]
                self.norm.see(torch.stack([g.norm(dim=1) for g in gradients]).norm(dim=0))
            self.optimizer.signal_skip_step(number < len(chunks))
            self.optimizer.step()
        if self.norm is not None:
            self.norm.advance()
        return total

    def backward(self, examples: Examples, drawn: Indices, pad_token_id: int) -> Tensor:
        """The summed loss; left are gradients of each example or unit (hooks), or the clipped sum (ghost)."""
        if self._units is not None:
            return self._of_units(self._units, examples, drawn, pad_token_id)
        if self._canaries is None:
            return self._backward(examples, drawn, pad_token_id)
        real = drawn < len(examples)
        total = self._backward(examples, drawn[real], pad_token_id)
        rows = self._canaries(drawn[~real] - len(examples))
        if self._mechanism.grad_sample_mode == "ghost":
            add_clipped(self.optimizer.params, rows, self._mechanism.max_grad_norm)
        else:
            add_rows(self.optimizer.params, rows)
        return total

    def _of_units(self, units: Units, examples: Examples, drawn: Indices, pad_token_id: int) -> Tensor:
        """`backward` where an example is a part of a unit, whose mean gradient is what is clipped."""
        real = drawn < len(examples)
        rows, owners = units.rows(drawn[real])
        total = self._backward(examples, rows, pad_token_id, shares(owners))
        if self._canaries is not None:
            parts, whose = as_examples(self._canaries(drawn[~real] - len(examples)))
            add_rows(self.optimizer.params, parts)
            owners = np.concatenate([owners, real.sum() + whose])
        join_at(self.optimizer.params, owners, len(drawn))
        drop_overflowed(self.optimizer.params)
        return total

    def _backward(
        self, examples: Examples, drawn: Indices, pad_token_id: int, weights: Weights | None = None
    ) -> Tensor:
        """`backward` for examples; with weights for parts of units, of which none is left out yet."""
        if len(drawn) == 0:
            return self._nobody()
        if self._mechanism.grad_sample_mode == "loop":
            return self._one_by_one(examples, drawn, pad_token_id, weights)
        batch = load_batch(examples, drawn, pad_token_id, self._model.device)
        losses = batch_loss(self._model, batch, reduction="none")
        if weights is not None:
            losses = losses * torch.from_numpy(weights).to(losses)
        if self._mechanism.grad_sample_mode == "ghost":
            from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

            DPTensorFastGradientClipping(self._watched, self.optimizer, losses, "sum").backward()
            if not all(bool(p.grad.isfinite().all()) for p in self.optimizer.params):
                return self._without_overflowed(examples, drawn, pad_token_id)
        else:
            losses.sum().backward()  # type: ignore[no-untyped-call]
            if weights is None:
                drop_overflowed(self.optimizer.params)
        return losses.detach().sum()

    def _without_overflowed(self, examples: Examples, drawn: Indices, pad_token_id: int) -> Tensor:
        """The clipped sum over the examples whose own gradient is finite, each looked at alone."""
        parameters, finite = self.optimizer.params, []
        for example in drawn:
            batch = load_batch(examples, np.array([example]), pad_token_id, self._model.device)
            loss = batch_loss(self._model, batch, reduction="none").sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            finite.append(all(g is None or bool(g.norm().isfinite()) for g in found))
        for parameter in parameters:
            parameter.grad = None
        if all(finite):
            raise RunFailed("the clipped sum of finite gradients is not finite")
        return self._backward(examples, drawn[np.array(finite)], pad_token_id)

    def _one_by_one(
        self, examples: Examples, drawn: Indices, pad_token_id: int, weights: Weights | None
    ) -> Tensor:
        """A backward pass for each example; one that takes no part in the loss has a gradient of zero."""
        parameters, total = self.optimizer.params, torch.zeros((), device=self._model.device)
        rows: list[tuple[Tensor, ...]] = []
        for place, example in enumerate(drawn):
            batch = load_batch(examples, np.array([example]), pad_token_id, self._model.device)
            loss = batch_loss(self._model, batch, reduction="none").sum()
            if weights is not None:
                loss = loss * float(weights[place])
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            pairs = zip(parameters, found, strict=True)
            rows.append(tuple(torch.zeros_like(p) if g is None else g for p, g in pairs))
            total += loss.detach()
        for parameter, gradients in zip(parameters, zip(*rows, strict=True), strict=True):
            parameter.grad_sample = torch.stack(gradients)  # (examples, *shape), as Opacus leaves it
            parameter.grad = parameter.grad_sample.sum(dim=0)
        if weights is None:
            drop_overflowed(parameters)
        return total

    def _nobody(self) -> Tensor:
        for parameter in self.optimizer.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), device=self._model.device)


@contextmanager
def private_steps(
    model: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
    generator: torch.Generator | None = None,
    canaries: Rows | None = None,
    units: Units | None = None,
    counts: torch.Generator | None = None,
) -> Iterator[PrivateSteps]:
    """Inside, Opacus' hooks watch the trained layers (a ``loop`` needs none); no trace is left afterwards.

    Args:
        model: inside its ``training()``.
        optimizer: over exactly the trained tensors.
        mechanism: what a step does.
        generator: draws the noise unless ``mechanism.secure``.
        canaries: the gradients of an audit's canaries, which are numbered on from the examples.
        units: whose examples are drawn; None where each example is one.
        counts: draws the noise on counts unless ``mechanism.secure``.
    """
    watched = None if mechanism.grad_sample_mode == "loop" else watched_model(model, mechanism)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            private = private_optimizer(optimizer, mechanism, generator, _names(model, optimizer))
            yield PrivateSteps(model, watched, private, mechanism, canaries, units, counts)
    finally:
        if watched is not None:
            watched.to_standard_module()
        for layer in model.module.modules():  # what a step that failed half-way leaves
            vars(layer).pop("activations", None)
            vars(layer).pop("max_batch_len", None)
        for parameter in model.module.parameters():
            vars(parameter).pop("summed_grad", None)


def _names(model: AdaptedModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the optimiser's tensors, in its order."""
    trained = model.trainable()
    names = {id(p): name for name, p in {**trained.factors, **trained.head}.items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def drop_overflowed(parameters: Sequence[Any]) -> None:
    """Let an example count as zero whose gradient or its norm is not finite.

    Clipping would make NaN of it, inf x 0, which shows in all that is released. Where a tensor has not one
    gradient for each example nothing is done, as Opacus or the self-test refuses that.
    """
    counts = {None if p.grad_sample is None else len(p.grad_sample) for p in parameters}
    if None in counts or len(counts) > 1:
        return
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters])  # (tensors, examples)
    overflowed = ~norms.norm(dim=0).isfinite()
    if overflowed.any():
        for parameter in parameters:
            shape = (-1, *[1] * (parameter.grad_sample.ndim - 1))
            parameter.grad_sample = parameter.grad_sample.masked_fill(overflowed.view(shape), 0.0)


def at_once(mechanism: Mechanism) -> int:
    """How many of those that were drawn are in memory at once, units with all of their examples; 0: all."""
    return mechanism.max_physical_batch_size // max(mechanism.unit_examples, 1)
