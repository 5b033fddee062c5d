"""Local training, as plainly as it can be written: the reference for every faster or private variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from clients.training.batches import Indices, load_batch, num_steps, physical_batches, shuffled_batches
from clients.training.forward import ForwardSteps
from clients.training.nested import NestedSteps
from clients.training.optimizers.registry import finish, make_optimizer
from clients.training.reference import with_references
from clients.training.schedule import ONLY_ROUND, ScheduledRates, Stage, at_rest, rate_factors
from fedlora.config import TrainConfig
from fedlora.core.adapters import Adapters
from fedlora.core.factors import Tensors
from fedlora.core.seeding import derive, stream
from fedlora.core.state import RankRegularizer, Trainable
from fedlora.data.examples import Examples
from fedlora.models import AdaptedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalResult:
    """Result of a client's local steps.

    Attributes:
        adapters: all tensors of every adapted layer.
        head: the head tensors if the head was trained, else empty.
        num_examples: how many examples the client holds.
        steps: optimiser steps taken.
        loss: mean training loss over the examples seen; None where it stays private.
        slopes: (steps,), of forward-only steps, see `clients.training.forward`; else None.
    """

    adapters: Adapters
    head: Tensors
    num_examples: int
    steps: int
    loss: float | None
    slopes: Tensor | None = None


def train_local(
    model: AdaptedModel,
    examples: Examples,
    indices: Indices,
    pad_token_id: int,
    config: TrainConfig,
    *,
    local_steps: int,
    seed: int,
    stage: Stage = ONLY_ROUND,
) -> LocalResult:
    """Train what ``model.load`` asked to train, from the values it loaded.

    The base stays in evaluation mode and the optimiser is new. Batches and dropout come from streams
    of ``seed``: the same seed gives the same bits on the same hardware with the same threads.

    Args:
        model: loaded with the client's starting values.
        examples: the data set.
        indices: the client's examples in it.
        pad_token_id: fills up shorter sequences of a batch.
        config: optimiser, rates, batch size, clipping, proximal term.
        local_steps: steps, unless ``config.local_epochs`` is set.
        seed: this client's and round's own seed.
        stage: where the round stands in its run.

    Raises:
        ConfigError: no example, or nothing to train.
    """
    steps = num_steps(config, len(indices), local_steps)
    examples = with_references(model, examples, [indices], pad_token_id)
    total, seen = torch.zeros((), device=model.device), 0
    with model.training() as trained, dropout_stream(seed, model.device):
        optimizer = make_optimizer(trained, config)
        rates = ScheduledRates(optimizer, rate_factors(config, steps, stage))
        penalties, resting = Penalties(trained, config), at_rest(trained.factors, config)
        cut = NestedSteps(trained, config, steps, seed).leading if config.nested_ranks else nullcontext
        forward = None if config.gradient == "backward" else ForwardSteps(trained, config, seed)

        def losses(drawn: Indices) -> Iterator[Tensor]:
            """Of the parts of a batch; their sum is the batch's mean loss."""
            for part in physical_batches(drawn, config.micro_batch_size):
                batch = load_batch(examples, part, pad_token_id, model.device, packed=config.packing)
                yield batch_loss(model, batch) * (len(part) / len(drawn))

        batches = shuffled_batches(indices, config.batch_size, steps, stream(seed, "batches"))
        for step, drawn in enumerate(batches):
            optimizer.zero_grad()
            with cut():
                if forward is None:
                    loss = backward(losses(drawn), model.device)
                else:
                    loss = forward.step(partial(summed, losses, drawn))
            total, seen = total + loss * len(drawn), seen + len(drawn)
            for parameter in resting[step % 2]:
                parameter.grad = None
            penalties.add_gradient()
            if config.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(trained.all, config.max_grad_norm)
            rates.advance()
            optimizer.step()
        finish(optimizer)
    slopes = None if forward is None else torch.stack(forward.slopes)
    return replace(local_result(model, trained, len(indices), steps, float(total) / seen), slopes=slopes)


def summed(losses: Callable[[Indices], Iterable[Tensor]], drawn: Indices) -> Tensor:
    """The sum of the losses of a batch's parts."""
    return torch.stack([*losses(drawn)]).sum()


def backward(losses: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of losses, whose gradient is added up part by part."""
    total = torch.zeros((), device=device)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    return total


def batch_loss(model: AdaptedModel, batch: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    """The loss of the model's task on a batch, from one number for each example."""
    with model.computing():
        return model.task.loss(model.module, batch, reduction)


class Proximal:
    """FedProx (Li et al., MLSys 2020): the gradient of ``mu/2 ||w - w_start||^2`` over what is trained."""

    def __init__(self, parameters: Sequence[nn.Parameter], mu: float) -> None:
        self.mu = mu
        self.parameters = parameters if mu > 0 else []
        self.start = [p.detach().clone() for p in self.parameters]

    def add_gradient(self) -> None:
        """``grad += mu (w - w_start)``."""
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.start, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - start, alpha=self.mu)


class TailGradient:
    """The gradient of a `RankRegularizer` over the layers that are trained.

    Of ``weight ||B_t|| ||A_t||`` it is ``weight ||B_t|| A_t / ||A_t||`` for A, and the other way round for B;
    a factor whose tail is zero gets none.
    """

    def __init__(self, factors: Mapping[str, nn.Parameter], penalty: RankRegularizer) -> None:
        self.weight, self.start = penalty.weight, penalty.start
        layers = [name.removesuffix(".A") for name in factors if name.endswith(".A")]
        self.pairs = [(factors[f"{n}.A"], factors[f"{n}.B"]) for n in layers if f"{n}.B" in factors]

    def add_gradient(self) -> None:
        """``grad += `` that of the penalty."""
        with torch.no_grad():
            for A, B in self.pairs:
                if A.grad is None or B.grad is None:
                    continue
                tail_a, tail_b = A[self.start :], B[:, self.start :]
                size_a, size_b = tail_a.norm(), tail_b.norm()
                A.grad[self.start :] += self.weight * size_b * torch.nan_to_num(tail_a / size_a)
                B.grad[:, self.start :] += self.weight * size_a * torch.nan_to_num(tail_b / size_b)


class Control:
    """What SCAFFOLD takes off the gradients in every step, see `clients.control`."""

    def __init__(self, trained: Trainable) -> None:
        found = {**trained.factors, **trained.head}
        self.pairs = [(found[n], t.to(found[n])) for n, t in trained.control.items() if n in found]

    def add_gradient(self) -> None:
        """``grad -= c_k - c``."""
        for parameter, correction in self.pairs:
            if parameter.grad is not None:
                parameter.grad.sub_(correction)


class Penalties:
    """Penalties added to the loss; they know no example and cost no privacy."""

    def __init__(self, trained: Trainable, config: TrainConfig) -> None:
        self.terms: list[Proximal | TailGradient | Control] = [
            Proximal(trained.all, config.proximal_mu), Control(trained),
        ]  # fmt: skip
        if trained.tail is not None:
            self.terms.append(TailGradient(trained.factors, trained.tail))

    def add_gradient(self) -> None:
        """The gradients of all terms."""
        for term in self.terms:
            term.add_gradient()


@contextmanager
def dropout_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from its own stream of ``seed``; the global state is put back afterwards.

    (Except the state of an mps device, which torch cannot fork.)
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout"))
        yield


def local_result(
    model: AdaptedModel, trained: Trainable, num_examples: int, steps: int, loss: float | None
) -> LocalResult:
    """Result from the values that the model holds."""
    adapters, head = model.read()
    return LocalResult(
        adapters=adapters,
        head=head if trained.head else {},
        num_examples=num_examples,
        steps=steps,
        loss=loss,
    )
