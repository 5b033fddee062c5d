"""Batched training of a cohort: one process trains several clients at once over one frozen base.

Read `clients.training.batched.train` first; the reference that it must equal is `clients.training.train`.
"""

from clients.training.batched.members import Member
from clients.training.batched.train import BatchSettings, train_cohort

__all__ = ["BatchSettings", "Member", "train_cohort"]
