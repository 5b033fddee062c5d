from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.assets.fetch import ASSETS, is_cached


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has an empty cache, except those marked `real`, which read the user's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    marker = request.node.get_closest_marker("real")
    if marker is None:
        monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
        return
    for name in marker.args:
        if not is_cached(name):
            pytest.skip(f"{ASSETS[name].requirement} is not in the cache (asset_path({name!r}) fetches it)")
