"""Time and memory that a run is expected to take, from a few steps and test examples tried here and now."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import numpy as np

from clients.evaluation import evaluate
from clients.training.batches import num_steps
from clients.training.train import train_local
from fedlora.data.examples import evaluation_subset
from fedlora.server.preview import Line, Preview

TRIED_STEPS, TRIED_EXAMPLES = 2, 64
"""What is timed: steps of one client, and test examples."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast this process is, in seconds.

    Attributes:
        step: of training of one client; 0 where nothing is trained.
        example: of evaluation.
    """

    step: float
    example: float


def pace_of(run: Preview, example: float | None = None) -> Pace:
    """The pace of a run, whose middle client makes a few steps; its model is left in some state.

    Args:
        run: not begun.
        example: seconds of evaluation, where they are known of another run of the same model and data.
    """
    return Pace(_step(run), _example(run) if example is None else example)


def expected_seconds(run: Preview, pace: Pace) -> float:
    """Seconds of training and evaluation if one process does all of it."""
    config, data = run.config, run.runtime.data
    sizes = _sizes(run)
    steps = [num_steps(config.train_of(p), sizes[p], config.local_steps_of(p)) for p in sizes]
    rounds = config.num_server_rounds - run.state.round
    subset = min(config.data.evaluate_examples or len(data.test), len(data.test))
    whole = 1 if run.runtime.model.task.labelled else 2  # the others are measured before training, too
    examples = rounds // config.evaluate_every * subset + whole * len(data.test)
    trained = rounds * min(run.in_a_round, len(sizes)) * float(np.mean(steps))
    return trained * pace.step + examples * pace.example


def expected(run: Preview) -> list[Line]:
    """Lines of time and memory."""
    pace = pace_of(run)
    about = f"about {duration(expected_seconds(run, pace))}"
    if pace.step:
        about += f" if one process trains ({pace.step:.2g} s a step here and now)"
    else:
        about += " of evaluation"
    return [("time", about), memory()]


def memory() -> Line:
    """Line of the memory that this process has taken so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return "memory", f"about {peak:.2g} GiB a process; the base is shared by those of one machine"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(42.4), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _sizes(run: Preview) -> dict[int, int]:
    """Partition -> its examples."""
    data = run.runtime.data
    return {partition: len(data.indices(partition)) for partition in sorted(run.partitions or data.clients)}


def _step(run: Preview) -> float:
    config, data, model = run.config, run.runtime.data, run.runtime.model
    sizes = _sizes(run)
    middle = sorted(sizes, key=lambda partition: (sizes[partition], partition))[len(sizes) // 2]
    began = run.broadcast(middle)
    model.load(
        began.adapters, began.head, trained=began.trained, modules=began.modules,
        train_head=config.model.head != "freeze",
    )  # fmt: skip
    if not model.trainable().all:
        return 0.0
    took = []
    for _ in range(2):  # the first also warms up
        start = time.perf_counter()
        train_local(
            model, data.train, data.indices(middle), data.pad_token_id, config.train,
            local_steps=TRIED_STEPS, seed=0,
        )  # fmt: skip
        took.append((time.perf_counter() - start) / num_steps(config.train, sizes[middle], TRIED_STEPS))
    return min(took)


def _example(run: Preview) -> float:
    config, data, model = run.config, run.runtime.data, run.runtime.model
    start, tried = time.perf_counter(), evaluation_subset(data.test, TRIED_EXAMPLES)
    evaluate(model, data.test, tried, data.pad_token_id, precision=config.evaluation_precision)
    return (time.perf_counter() - start) / max(1, len(tried))
