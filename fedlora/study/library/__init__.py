"""Public API: what the command line does, as functions that return values.

A script that runs a simulation needs no ``if __name__ == "__main__"``: Ray starts processes of its own.
"""

import warnings

from fedlora.study.library.adapters import aggregate, evaluate, load
from fedlora.study.library.runs import RoundCallback, RunResult, load_run, run
from fedlora.study.library.studies import StudyResult, compare, load_study

__all__ = [
    "RoundCallback",
    "RunResult",
    "StudyResult",
    "aggregate",
    "compare",
    "evaluate",
    "load",
    "load_run",
    "load_study",
    "run",
]

# In a notebook without widgets tqdm, which transformers imports, asks for them; fedlora's own bars need none.
warnings.filterwarnings("ignore", message="IProgress not found")
