"""Adapters in the hands of somebody who has PEFT alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

OPEN = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch, peft
for line in sys.stdin:
    kind, adapter, options, folder = json.loads(line)
    os.chdir(folder)
    model = getattr(peft, kind).from_pretrained(adapter, **options).eval()
    with torch.no_grad():
        torch.save(model(**torch.load("batch.pt")).logits, "logits.pt")
    print("opened", flush=True)
"""


@dataclass
class Elsewhere:
    """A process that knows nothing of fedlora and opens adapters with PEFT's Auto classes."""

    process: subprocess.Popen[str]
    errors: Path

    def opened(self, kind: str, adapter: Path, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        """The logits of an Auto class in another directory."""
        folder = adapter.with_name("elsewhere")
        folder.mkdir()
        torch.save(inputs, folder / "batch.pt")
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(json.dumps([kind, str(adapter), options, str(folder)]), file=self.process.stdin, flush=True)
        except BrokenPipeError:  # an earlier one has ended it
            pytest.fail(self.errors.read_text()[-2000:])
        assert any(line == "opened\n" for line in self.process.stdout), self.errors.read_text()[-2000:]
        found: torch.Tensor = torch.load(folder / "logits.pt")
        return found


@contextmanager
def opener(home: Path) -> Iterator[Elsewhere]:
    """The process, which stands in ``home`` and ends with the context."""
    errors = home / "errors"
    with errors.open("w") as log, subprocess.Popen(
        [sys.executable, "-c", OPEN], cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=log, text=True,
    ) as process:  # fmt: skip
        yield Elsewhere(process, errors)
