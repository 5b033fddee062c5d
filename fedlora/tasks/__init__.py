"""Tasks: the seam between the data, the model and everything that trains, evaluates or protects.

`Task` says what a task is; each has one module; `TASKS` lists them. How to add one: ``docs/tasks.md``.
"""

from __future__ import annotations

from fedlora.errors import unknown_name
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import CLASSIFICATION
from fedlora.tasks.images import ImageClassification
from fedlora.tasks.instruction import Instruction
from fedlora.tasks.task import Encoded, ExampleMetrics, Task

__all__ = ["CLASSIFICATION", "TASKS", "Encoded", "ExampleMetrics", "Task", "task_named"]

ALL: tuple[Task, ...] = (CLASSIFICATION, CausalLM(), Instruction(), ImageClassification())
TASKS = {task.name: task for task in ALL}


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
