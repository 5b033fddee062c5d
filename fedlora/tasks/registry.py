"""All tasks, by the name that ``task`` takes."""

from __future__ import annotations

from fedlora.errors import ConfigError
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import CLASSIFICATION
from fedlora.tasks.images import ImageClassification
from fedlora.tasks.instruction import Instruction
from fedlora.tasks.task import Task

ALL: tuple[Task, ...] = (CLASSIFICATION, CausalLM(), Instruction(), ImageClassification())
TASKS = {task.name: task for task in ALL}


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"task = {name!r}: accepted are {', '.join(TASKS)}")
    return TASKS[name]
