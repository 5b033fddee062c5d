"""What a choice among private runs costs: the epsilon of all that the choice has looked at.

A rate is chosen by trials, private runs on the training part of the data that are measured on the validation
part, and the reported run then trains on both. Neighbours differ by one example, which is

* in the training part of every trial: it is in all of these runs and in the reported one. They are fixed
  beforehand but for the rate, on which no privacy loss depends, so that they compose (Zhu, Dong and Wang,
  AISTATS 2022, Theorem 10; of Renyi divergences Mironov, CSF 2017, Proposition 1). What is chosen, and every
  accuracy that is shown, is post-processing of them.
* in the validation part: it is in no trial, and moves the hits of each by at most 1. With discrete Laplace
  noise of scale (trials / epsilon) on each the choice is epsilon-DP (Dwork et al., TCC 2006), which adds to
  the reported run's.

The stated epsilon is the larger one. Cheaper theorems (Liu and Talwar, STOC 2019; Papernot and Steinke, ICLR
2022) need a random number of trials and release the best of these runs alone. Here all rates are tried, all
are shown, and what is released is another run; a fixed number of trials has no such bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.errors import ConfigError
from fedlora.privacy.accountants import History, epsilon_of_divergence, renyi_divergence
from fedlora.privacy.calibration import epsilon_of

ClientHistories = Sequence[History]
"""Of the clients of a run; an example is at one of them, by another partitioning in each run at any."""


def epsilon_of_runs(
    runs: Sequence[ClientHistories], target_delta: float, accountant: str
) -> tuple[float, str]:
    """Epsilon of an example that is in all of these runs, and the accountant that found it.

    Where each run has one history for all its clients these are composed as they are. Otherwise the largest
    Renyi divergence of any client counts in each run, order by order.

    Args:
        runs: the histories of each.
        target_delta: delta.
        accountant: of `fedlora.privacy.accountants.ACCOUNTANTS`, where it can be used.
    """
    if all(len(set(run)) == 1 and len(run[0]) == 1 for run in runs):
        try:
            return epsilon_of(tuple(run[0][0] for run in runs), target_delta, accountant), accountant
        except ConfigError:  # beyond what it resolves
            pass
    divergence = sum(np.max([renyi_divergence(history) for history in run], axis=0) for run in runs)
    return epsilon_of_divergence(np.asarray(divergence), target_delta), "rdp"
