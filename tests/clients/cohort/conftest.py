"""One tiny network for the tests of a module."""

from __future__ import annotations

import pytest

from fedlora.models import AdaptedModel
from tests.clients.cohort.samples import model


@pytest.fixture(scope="module")
def network() -> AdaptedModel:
    return model()
