"""The same examples every time: a red test is red for everybody."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fedlora", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("fedlora")
