"""One thread where bits matter: how a sum is split over threads decides its rounding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, so that results have the same bits on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[function(item) for item in items]`` on all cores, each call on one thread: the same bits on any."""
    everything = list(items)
    workers = min(len(everything), os.cpu_count() or 1)
    with one_thread():
        if workers < 2:
            return [function(item) for item in everything]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(function, everything))
