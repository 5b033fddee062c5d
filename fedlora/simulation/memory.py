"""Peak memory of this process and all its children, sampled in the background."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

SAMPLE_SECONDS = 2.0


class PeakMemory:
    """Watches memory while a block runs; ``peak_bytes`` is the largest sum that was seen.

    Proportional set size where the system has it (Linux), so that pages shared between processes count
    once; resident set size elsewhere, which counts them for each process.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, memory_now())
            if self._stop.wait(SAMPLE_SECONDS):
                return


def memory_now() -> int:
    """Bytes that this process and its children hold now."""
    own = psutil.Process()
    return sum(_bytes_of(process) for process in [own, *own.children(recursive=True)])


def _bytes_of(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
        return int(getattr(info, "pss", 0) or info.rss)
    except psutil.Error:
        return 0
