"""Tasks: the seam between the data, the model and everything that trains, evaluates or protects.

`Task` says what a task is; each has one module; `TASKS` lists them. How to add one: ``docs/tasks.md``.
"""

from fedlora.tasks.classification import CLASSIFICATION
from fedlora.tasks.registry import TASKS, task_named
from fedlora.tasks.task import Encoded, ExampleMetrics, Task

__all__ = ["CLASSIFICATION", "TASKS", "Encoded", "ExampleMetrics", "Task", "task_named"]
