from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.samples import save_tiny_gpt2

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gpt2(tmp_path_factory.mktemp("gpt2"))
