"""Node that carries an instruction out: for whom, where it keeps what it holds, and what its owner allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clients.node_settings import EvaluationNoise
from clients.store import ResolvedInstruction
from clients.training.canaries import Canaries
from fedlora import wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Client that an instruction is for, and where it keeps what it holds.

    Attributes:
        partition_id: whose data is trained on.
        state_dir: what this machine keeps between messages.
        simulation: this process belongs to a simulation, so that privacy's randomness may be seeded.
        canaries: what an audit hides among the client's examples, in private training.
        max_epsilon, max_delta: the owner's limits on what is ever spent on its examples.
        before_evaluation: called before an evaluation; raises ConfigError where none may leave.
        evaluation_noise: with which evaluations leave; None: they leave exactly.
        set_aside: what of ``max_epsilon`` is kept for evaluations.
        tells_second: what second adapters reach may leave; they are trained without noise.
        largest_value: in size, of what a message brings; infinite: any value.
        check_start: called with what training would start from, before anything is spent; raises ConfigError
            where it is not what the round's clients agree on.
    """

    partition_id: int
    state_dir: Path
    simulation: bool = False
    canaries: Canaries | None = None
    max_epsilon: float = math.inf
    max_delta: float = 1.0
    before_evaluation: Callable[[], None] | None = None
    evaluation_noise: EvaluationNoise | None = None
    set_aside: float = 0.0
    tells_second: bool = True
    largest_value: float = math.inf
    check_start: Callable[[wire.TrainInstruction, ResolvedInstruction], None] | None = None
