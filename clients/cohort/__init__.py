"""The cohort trainer: one process trains several clients at once over one frozen base.

Read `clients.cohort.train` first; the reference that it must equal is `clients.training`.
"""

from clients.cohort.members import Member
from clients.cohort.train import Task, train_cohort

__all__ = ["Member", "Task", "train_cohort"]
