"""FSLoRA: a client trains some directions of the global adapter, drawn for it anew each round.

Fang et al., "Federated Sketching LoRA: A Flexible Framework for Heterogeneous Collaborative Fine-Tuning of
LLMs", 2025 (arXiv 2501.19389). With r the global rank and I_k a set of r_k of its directions, drawn for each
round, client and layer, client k trains

    W_0 + s (r / r_k) B_{I_k} A_{I_k},       E[ (r / r_k) B_{I_k} A_{I_k} ] = B A,

and the columns and rows that it held move by the mean:  B' = B + sum_k p_k (B_k - B)_{I_k},  A' likewise.

So each direction is trained by clients of any rank, where zero-padding and FlexLoRA leave the last ones to
those of the highest. Not exact: factors are averaged apart. Where all have the global rank it is FedAvg. As
elsewhere, B_k stands for its multiple that goes with the client's own scaling s_k in place of s r / r_k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.adapters import lora_set, resized
from fedlora.core.factors import LoraFactors, resize
from fedlora.core.init_drawn import FRESH
from fedlora.core.seeding import torch_stream
from fedlora.core.state import Broadcast, ClientSpec, State, Template
from fedlora.errors import ConfigError
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rule import Rule


@dataclass(frozen=True, kw_only=True)
class FSLoRARule(Rule):
    """Drawn directions of A and B moved by the clients' mean change, the remainder dropped.

    Attributes:
        rank: the global rank r, at least the largest of the clients, which it is if 0.

    Raises:
        ConfigError: a rank below 0, or at the start one below a client's.
    """

    rank: int = 0

    facts: ClassVar[Facts] = Facts(
        name="fslora",
        title="FSLoRA",
        paper="Fang et al., arXiv 2501.19389",
        exact=False,
        mixed_ranks=True,
        draws_ranks=True,
        mean=False,
        stale="which directions a client held is drawn for one round",
        secure_sum=False,
        supported_inits=(*FRESH, "eva"),
        inits_why="sends parts of an adapter, and with them of what was taken out of the base",
        up="r_k(o+i)",
        down="r_k(o+i)",
        deviation="clients count by their examples, in the authors' code alike; there A and B draw other "
        "directions, and no parameter has the name that it looks for, so that all clients train all of them",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)

    def init(self, template: Template, seed: int) -> State:
        return super().init(at_rank(template, self.rank), seed)

    def broadcast(self, state: State, client: ClientSpec) -> Broadcast:
        parts = {}
        for name, whole in lora_set(state.adapters).items():
            held = drawn(state.seed, state.round + 1, client.partition_id, name, whole.rank, client.rank)
            scaling = whole.scaling * whole.rank / len(held)
            parts[name] = LoraFactors(whole.A[held], whole.B[:, held], scaling)
        adapters = resized(parts, client.rank, client.scaling)
        return replace(super().broadcast(state, client), adapters=adapters)

    def merge(self, layer: Layer) -> Merged:
        start = layer.start
        A, B = start.A.clone(), start.B.clone()
        for client in layer.clients:
            rank, who = client.factors.rank, client.partition_id
            held = drawn(layer.seed, layer.server_round, who, layer.name, start.rank, rank)
            f = resize(client.factors, len(held), start.scaling * start.rank / len(held))
            A[held] += client.weight * (f.A - start.A[held])
            B[:, held] += client.weight * (f.B - start.B[:, held])
        return Merged(LoraFactors(A, B, start.scaling))


def check_rank(rank: int) -> None:
    """Refuse a global rank below 0."""
    if rank < 0:
        raise ConfigError(f"strategy.options rank = {rank}: must be >= 0")


def at_rank(template: Template, rank: int) -> Template:
    """The template with another global rank, at the same alpha; 0 leaves it.

    Raises:
        ConfigError: it is below the largest of the clients.
    """
    if 0 < rank < template.rank:
        least = f"must be at least {template.rank}, the largest of the clients, or 0"
        raise ConfigError(f"strategy.options rank = {rank}: {least}")
    rank = rank or template.rank
    scaling = template.scaling * template.rank / rank
    given = None if template.adapters is None else resized(template.adapters, rank, scaling)
    return replace(template, rank=rank, scaling=scaling, adapters=given)


def drawn(seed: int, server_round: int, partition_id: int, module: str, rank: int, most: int) -> Tensor:
    """The directions among ``rank``, at most so many, that a client holds in a round, ascending."""
    stream = torch_stream(seed, "sketch", server_round, partition_id, module)
    return torch.randperm(rank, generator=stream)[:most].sort().values
