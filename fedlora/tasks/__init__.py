"""Tasks: the seam between the data, the model and everything that trains, evaluates or protects.

`Task` says what a task is; each has one module; `TASKS` lists them. How to add one: ``docs/tasks.md``.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.config import RunConfig
from fedlora.errors import unknown_name
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import CLASSIFICATION, SINGLE_LABEL
from fedlora.tasks.images import ImageClassification
from fedlora.tasks.instruction import Instruction
from fedlora.tasks.preference import Preference
from fedlora.tasks.targets import MultiLabelClassification, Regression
from fedlora.tasks.task import Encoded, ExampleMetrics, Task

__all__ = [
    "CLASSIFICATION",
    "SINGLE_LABEL",
    "TASKS",
    "Encoded",
    "ExampleMetrics",
    "Task",
    "task_named",
    "task_of",
]

ALL: tuple[Task, ...] = (
    CLASSIFICATION, Regression(), MultiLabelClassification(), CausalLM(), Instruction(), Preference(),
    ImageClassification(),
)  # fmt: skip
TASKS = {task.name: task for task in ALL}


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


def task_of(config: RunConfig) -> Task:
    """The task of a run, with what the run says of its loss.

    Raises:
        ConfigError: there is none of that name.
    """
    task = task_named(config.task)
    return replace(task, beta=config.train.dpo_beta) if isinstance(task, Preference) else task
