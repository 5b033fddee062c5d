from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.deployment.operator.create import create
from tests.federation.signed_nodes import NODES


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a federation whose nodes sign, as `fedlora federation init` makes it."""
    return create(tmp_path_factory.mktemp("signed") / "f", NODES).path
