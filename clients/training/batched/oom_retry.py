"""A cohort that does not fit into memory: two of half the size, one after the other.

What a client draws follows from its own seed, so that its training begins again as if for the first time;
but its last bits depend on who trains with it. So such a result is marked. Under privacy nothing of the
attempt that failed has left the process: it is one release, which is charged once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch

from clients.training.batched.members import Member
from clients.training.batched.train import BatchSettings, train_cohort
from clients.training.train import LocalResult
from fedlora.models import AdaptedModel


def train_with_retry(
    model: AdaptedModel, members: Sequence[Member], task: BatchSettings
) -> tuple[list[LocalResult], bool]:
    """`train_cohort`, in halves as often as memory asks for it; and whether it did.

    Raises:
        MemoryError: not even one client fits. (Or torch's own error.)
    """
    try:
        return train_cohort(model, members, task), False
    except (MemoryError, RuntimeError) as error:
        if len(members) == 1 or not out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _say(len(members))
    middle = (len(members) + 1) // 2
    halves = [train_with_retry(model, half, task)[0] for half in (members[:middle], members[middle:])]
    return [result for half in halves for result in half], True


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on a processor torch says so in words only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in ("can't allocate memory", "not enough memory", "out of memory"))


@cache
def _say(size: int) -> None:
    logging.getLogger("fedlora").warning(
        "engine.cohort-size: %d clients do not fit into memory, they train in halves; the run is not "
        "reproducible bit by bit", size,
    )  # fmt: skip
