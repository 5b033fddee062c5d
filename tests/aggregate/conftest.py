from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.aggregate.saved import FAMILIES, save_adapter, save_base

MIXED: tuple[dict[str, Any], ...] = (
    {"r": 3, "lora_alpha": 6},
    {"r": 5, "lora_alpha": 12, "use_rslora": True},
    {"r": 4, "lora_alpha": 3, "rank_pattern": {"0.*": 2}, "alpha_pattern": {"0.*": 7}},
)
"""Ranks, alphas and scalings that differ between the adapters, and within one."""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def mixed(bases: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Path]]:
    """For each family adapters of mixed ranks, alphas, scalings and target modules."""
    root = tmp_path_factory.mktemp("mixed")
    found: dict[str, list[Path]] = {}
    for family, kind in FAMILIES.items():
        targets = (kind.targets[:2], kind.targets, kind.targets[1:])
        found[family] = [
            save_adapter(root / f"{family}-{k}", family, bases[family], k, target_modules=list(t), **config)
            for k, (t, config) in enumerate(zip(targets, MIXED, strict=True))
        ]
    return found


@pytest.fixture(scope="session")
def alike(bases: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Path]]:
    """For each family adapters of one rank that share their A; alphas differ."""
    root = tmp_path_factory.mktemp("alike")
    return {
        family: [
            save_adapter(
                root / f"{family}-{k}", family, bases[family], k, shared_a=99, r=4, lora_alpha=4 * (k + 1)
            )
            for k in range(3)
        ]
        for family in FAMILIES
    }
