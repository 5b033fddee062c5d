"""Local training of several clients in one batched pass over one frozen base.

It computes what `clients.training.train.train_local` (or `clients.training.dp_sgd.train_private`) computes
for each client alone, rounding apart: the same batches, dropout masks and noise, each from the client's own
streams; the same penalties, clipping and optimiser, each on the client's own part. Nothing of a client
enters another's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from clients.training.batched.dropout import Masks
from clients.training.batched.forward import ForwardSteps
from clients.training.batched.layers import ForwardContext, Route, row_wise
from clients.training.batched.members import Member, open_streams
from clients.training.batched.private import ClippedSums, as_drawn
from clients.training.batched.rows import ACCELERATOR, CPU, Rows, gather, microbatches, passes
from clients.training.batched.stacks import StackedAdapters
from clients.training.batched.update import Gradients, Update
from clients.training.batches import Indices, load_batch
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_sgd import check_drawn
from clients.training.dp_step import at_once
from clients.training.nested import SetAside, beyond, drawn_ranks, zero
from clients.training.reference import with_references
from clients.training.schedule import NOTHING, ONLY_ROUND, Stage, resting, rests
from clients.training.train import LocalResult, batch_loss
from clients.training.units import joined
from fedlora.config import TrainConfig
from fedlora.data.examples import Examples
from fedlora.models import AdaptedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """Shared settings of all clients of a cohort.

    Attributes:
        examples: the data set.
        pad_token_id: fills up shorter sequences.
        config: optimiser, rates, batch size, clipping, proximal term.
        dropout: on the adapters' inputs.
        release_loss: return the training loss of private training too.
        stage: where the round stands in its run.
    """

    examples: Examples
    pad_token_id: int
    config: TrainConfig
    dropout: float = 0.0
    release_loss: bool = False
    stage: Stage = ONLY_ROUND


@dataclass(frozen=True, slots=True)
class PassResult:
    """A forward pass that is done.

    Attributes:
        clients: (rows,), whose each row is.
        losses: (rows,).
        values: what was trained on, by name: stacked by row or by client.
        units: (rows,), of which unit each row is; None where each is one.
    """

    clients: Tensor
    losses: Tensor
    values: Mapping[str, Tensor]
    units: Tensor | None = None

    def gradients(self) -> dict[str, Tensor]:
        """Of the values by row, after the backward pass; zero where a tensor takes no part in the loss."""
        return {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in self.values.items()}


def train_cohort(model: AdaptedModel, members: Sequence[Member], task: BatchSettings) -> list[LocalResult]:
    """Train all members; the results are in their order.

    Members have the same kind of factors (all with a core, or none) and are private all or none.

    Args:
        model: its base is used; its own adapter and head take no part and stay as they are.
        members: 1 or more, each with 1 step or more.
        task: what is alike for all.
    """
    held = [member.indices for member in members]
    task = replace(task, examples=with_references(model, task.examples, held, task.pad_token_id))
    order = sorted(range(len(members)), key=lambda place: -members[place].steps)
    cohort = Cohort(model, [members[place] for place in order], task)
    with cohort.route_laid():
        for step in range(members[order[0]].steps):
            cohort.step(step)
    results = dict(zip(order, cohort.results(), strict=True))
    return [results[place] for place in range(len(members))]


class Cohort:
    """The state of a cohort's training.

    Args:
        model: its base is used.
        members: in the order of their steps, most first.
        task: what is alike for all.

    Attributes:
        stacks: the trained values, as they are now.
        counts: of the last private step, see `ClippedSums`.
    """

    def __init__(self, model: AdaptedModel, members: Sequence[Member], task: BatchSettings) -> None:
        self._model, self._members, self._task = model, members, task
        self.stacks = StackedAdapters(model, members)
        self.counts = torch.zeros(0)
        self._update = Update(self.stacks, task.config, task.stage)
        self._streams = [
            open_streams(member, task.config, self.stacks.device, task.examples) for member in members
        ]
        self._canaries = [self._rows_of(place) for place in range(len(members))]
        self._costs = CPU if self.stacks.device.type == "cpu" else ACCELERATOR
        self._route = Route()
        self._losses = torch.zeros(len(members), device=self.stacks.device, dtype=self.stacks.dtype)
        self._sizes: list[list[int]] = [[] for _ in members]
        self._forward = ForwardSteps(self.stacks, task.config.perturbation_size)
        nested = members if task.config.nested_ranks else ()
        self._ranks = [drawn_ranks(m.rank, m.steps, self._streams[i].seed) for i, m in enumerate(nested)]

    def route_laid(self) -> AbstractContextManager[None]:
        """Inside, the model computes each row by its own client's factors; steps are taken there."""
        return row_wise(self._model, self._route)

    def step(self, number: int) -> None:
        """Step ``number``, from 0, of all who have so many."""
        active = sum(member.steps > number for member in self._members)
        batches = [next(stream.batches) for stream in self._streams[:active]]
        for sizes, batch in zip(self._sizes, batches, strict=False):
            sizes.append(len(batch))
        mechanisms = [self._now(place) for place in range(active) if self._members[0].mechanism is not None]
        ending = resting(self._task.config, number)
        aside = SetAside(self._beyond(self.stacks.values, number, active))
        forward = self._task.config.gradient == "forward"
        plain = partial(self.forward, number=number) if forward else self.plain
        gradients = self.private(batches, mechanisms, ending) if mechanisms else plain(batches)
        aside.put_back()
        zero(self._beyond(gradients, number, active))
        gradients = {name: g for name, g in gradients.items() if not rests(name, ending)}
        for place, stream in enumerate(self._streams[:active]):
            if stream.norm is not None:
                stream.norm.add(float(self.counts[place]))
                stream.norm.advance()
        self._update.step(gradients, active)

    def _beyond(self, tensors: Mapping[str, Tensor], number: int, active: int) -> list[Tensor]:
        """The members' parts that a nested step leaves, see `clients.training.nested`."""
        own, found = self.stacks.own, list[Tensor]()
        for place, ranks in enumerate(self._ranks[:active]):
            parts = {name: own(tensor.detach(), name, place) for name, tensor in tensors.items()}
            found += beyond(parts, ranks[number])
        return found

    def _now(self, place: int) -> Mechanism:
        """The mechanism of a member's next step."""
        mechanism, norm = self._members[place].mechanism, self._streams[place].norm
        assert mechanism is not None
        return mechanism if norm is None else replace(mechanism, max_grad_norm=norm.value)

    def plain(self, batches: Sequence[Indices]) -> Gradients:
        """The gradient of each client's mean loss; a tensor that takes no part in the loss has none."""
        stacks = self.stacks
        for name in stacks.trained:
            stacks.values[name].grad = None
        sizes = torch.tensor([len(batch) for batch in batches], device=stacks.device, dtype=stacks.dtype)
        for walked in self._passes(
            gather(self._task.examples, batches), most_rows=self._task.config.micro_batch_size
        ):
            (walked.losses / sizes[walked.clients]).sum().backward()  # type: ignore[no-untyped-call]
        found = {name: stacks.values[name].grad for name in stacks.trained}
        return {name: grad[: len(batches)] for name, grad in found.items() if grad is not None}

    def forward(self, batches: Sequence[Indices], number: int) -> Gradients:
        """As `plain`, by the slope of each client's loss, see `clients.training.forward`."""
        sizes = torch.tensor([len(batch) for batch in batches]).to(self._losses)

        def losses() -> Tensor:
            before, self._losses = self._losses, torch.zeros_like(self._losses)
            rows = gather(self._task.examples, batches)
            for _ in self._passes(rows, most_rows=self._task.config.micro_batch_size):
                pass
            found, self._losses = self._losses, before + self._losses / 2  # of two sides
            return found[: len(batches)] / sizes

        return self._forward.step(number, self._streams[: len(batches)], losses)

    def private(
        self, batches: Sequence[Indices], mechanisms: Sequence[Mechanism], ending: str = NOTHING
    ) -> Gradients:
        """Each client's noisy mean of clipped gradients; of an empty draw, and of what rests, noise alone."""
        sums = ClippedSums(self.stacks, mechanisms, ending)
        most, own = mechanisms[0].max_physical_batch_size, len(self._task.examples)
        for place, batch in enumerate(batches):
            made_up, canaries = self._canaries[place], batch[batch >= own] - own
            if made_up is not None and len(canaries):
                clients = torch.full((len(canaries),), place, device=self.stacks.device)
                sums.add(as_drawn(made_up(canaries), mechanisms[place]), clients)
        for wave in microbatches([batch[batch < own] for batch in batches], at_once(mechanisms[0])):
            if not any(len(batch) for batch in wave):
                continue
            if mechanisms[0].unit_examples:
                sums.add(*self._of_units(wave, most))
            else:
                rows = gather(self._task.examples, wave)
                for walked in self._passes(rows, by_example=True, most_rows=most):
                    walked.losses.sum().backward()  # type: ignore[no-untyped-call]
                    sums.add(walked.gradients(), walked.clients)
        self.counts = sums.counts
        return sums.released([stream.noise for stream in self._streams])

    def _of_units(self, wave: Sequence[Indices], most: int) -> tuple[Gradients, Tensor]:
        """The mean gradient of each drawn unit, of whose examples several passes may have some; and whose."""
        streams = zip(self._streams, wave, strict=False)
        drawn = [stream.units.rows(batch) for stream, batch in streams if stream.units is not None]
        rows = gather(self._task.examples, [own for own, _ in drawn], [owners for _, owners in drawn])
        clients = np.repeat(np.arange(len(wave)), [len(batch) for batch in wave])  # (units,): whose each is
        stacks = self.stacks
        shapes = {name: stacks.values[name].shape[1:] for name in stacks.trained}
        means = {n: stacks.values[n].new_zeros((len(clients), *shape)) for n, shape in shapes.items()}
        for walked in self._passes(rows, by_example=True, most_rows=most):
            walked.losses.sum().backward()  # type: ignore[no-untyped-call]
            assert walked.units is not None
            for name, gradients in walked.gradients().items():
                means[name] += joined(gradients, walked.units, len(clients))
        return means, torch.from_numpy(clients).to(stacks.device)

    def results(self) -> list[LocalResult]:
        """Results of all members, who have done their steps."""
        self._update.finish()
        return [self._result(place) for place in range(len(self._members))]

    def _rows_of(self, place: int) -> Callable[[Indices], Gradients] | None:
        """Numbers of a member's canaries -> their gradients, stacked by row."""
        stacks, member = self.stacks, self._members[place]
        if member.canaries is None:
            return None
        names = stacks.trained_by(member)
        found = member.canaries.rows({n: stacks.own(stacks.values[n], n, place).detach() for n in names})

        def rows(numbers: Indices) -> Gradients:
            shapes = {n: stacks.values[n].shape[1:] for n in stacks.trained}
            filled = {n: torch.zeros(len(numbers), *s).to(stacks.values[n]) for n, s in shapes.items()}
            for name, row in zip(names, found(numbers), strict=True):
                filled[name][tuple(slice(size) for size in row.shape)] = row.to(filled[name])
            return filled

        return rows

    def _passes(self, rows: Rows, *, by_example: bool = False, most_rows: int = 0) -> Iterator[PassResult]:
        """Forward passes over all rows; with ``by_example`` each row has leaves of its own."""
        task, masks = self._task, None
        if task.dropout > 0:
            streams = [stream.dropout for stream in self._streams]
            masks = Masks(task.dropout, streams, rows, padded=task.examples.image is None)
        for part in passes(rows, self._costs, most_rows):
            clients = torch.from_numpy(part.clients).to(self.stacks.device)
            values = self.stacks.of_rows(clients, by_example=by_example)
            if masks is not None:
                masks.begin(part)
            self._route.context = ForwardContext(self.stacks.scaled(values, clients), len(part), masks)
            batch = load_batch(task.examples, part.examples, task.pad_token_id, self.stacks.device)
            losses = batch_loss(self._model, batch, reduction="none")
            if part.shares is not None:
                losses = losses * torch.from_numpy(part.shares).to(losses)
            units = None if part.units is None else torch.from_numpy(part.units).to(self.stacks.device)
            self._losses.index_add_(0, clients, losses.detach())
            yield PassResult(clients, losses, {name: values[name] for name in self.stacks.trained}, units)

    def _result(self, place: int) -> LocalResult:
        member, drawn, sizes = self._members[place], self._streams[place], self._sizes[place]
        if member.mechanism is not None:
            if member.canaries is not None:
                member.canaries.drew(sizes, drawn.drawn_from)
            check_drawn(sizes, drawn.drawn_from, drawn.rate)
        adapters, head = self.stacks.read(place)
        told = member.mechanism is None or self._task.release_loss
        return LocalResult(
            adapters=adapters,
            head=head if member.train_head else {},
            num_examples=len(member.indices),
            steps=member.steps,
            loss=float(self._losses[place]) / max(sum(sizes), 1) if told else None,
            slopes=self._forward.slopes(place),
        )
