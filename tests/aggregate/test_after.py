"""What is done to an aggregate before it is written: a largest rank, and intruder dimensions reduced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.aggregate.saved import FAMILIES, aggregate, assert_close, deltas, loaded, mean_delta, refused
from tests.oracles import Array

SHARES = (0.0, 0.25, 1.0)


def written(family: str, base: Path, out: Path) -> Mapping[str, Array]:
    return deltas(loaded(family, base, out))


def weights(family: str, base: Path, names: Mapping[str, Array]) -> dict[str, Array]:
    """The base's weights as its layers store them."""
    model = FAMILIES[family].open(base)
    return {
        name: model.get_submodule(name.removeprefix("base_model.model.")).weight.detach().double().numpy()
        for name in names
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_a_largest_rank_is_the_nearest_of_it(
    family: str, bases: Mapping[str, Path], mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = aggregate("--strategy", "flora", "--max-rank", "2", "--json", "--out", out, *mixed[family])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    whole = mean_delta(family, bases[family], mixed[family], [1 / 3] * 3)
    nearest, gone, total = {}, 0.0, 0.0
    for name, dense in whole.items():
        U, S, Vh = np.linalg.svd(dense, full_matrices=False)
        nearest[name] = (U[:, :2] * S[:2]) @ Vh[:2]
        gone, total = gone + (S[2:] ** 2).sum(), total + (S**2).sum()
    assert_close(written(family, bases[family], out), nearest, 1e-5)
    assert found["ranks_out"] == [2]
    assert found["energy_cut"] == pytest.approx(gone / total, rel=1e-4)
    assert any(note.startswith("vLLM") for note in found["notes"])
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {}, {})


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_intruders_are_reduced_in_the_layers_own_orientation(
    family: str, share: float, bases: Mapping[str, Path], mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    """Also where layers store (in, out), which turns left vectors into right ones."""
    out = tmp_path / "out"
    done = aggregate(
        "--strategy", "flora", "--reduce-intruders", str(share), "--base", bases[family], "--json",
        "--out", out, *mixed[family],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    whole = mean_delta(family, bases[family], mixed[family], [1 / 3] * 3)
    base, wanted, count, looked_at = weights(family, bases[family], whole), {}, 0, 0
    for name, dense in whole.items():
        turned = FAMILIES[family].conv1d
        W, D = (base[name].T, dense.T) if turned else (base[name], dense)
        X = np.linalg.svd(W, full_matrices=False)[0]
        U, S, Vh = np.linalg.svd(W + D, full_matrices=False)
        for j in range(min(10, len(S))):
            looked_at += 1
            if np.abs(X.T @ U[:, j]).max() < 0.5:
                count += 1
                D = D - (1 - share) * S[j] * np.outer(U[:, j], Vh[j])
        wanted[name] = D.T if turned else D
    assert count > 0
    assert json.loads(done.stdout)["intruders"] == [count, looked_at]
    assert_close(written(family, bases[family], out), wanted, 1e-4)


def test_what_cannot_be_done_is_refused(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    request = ["--strategy", "fedavg", "--out", tmp_path / "out", *alike["llama"][:2]]
    refused(aggregate(*request, "--max-rank", "-1"), "--max-rank -1", "must be >= 1")
    refused(aggregate(*request, "--max-rank", "2", "--merge"), "--max-rank 2", "a merged model has no rank")
    refused(aggregate(*request, "--reduce-intruders", "0.5"), "--reduce-intruders 0.5", "give --base")
    refused(aggregate(*request, "--reduce-intruders", "1.5"), "--reduce-intruders 1.5", "from 0")
    assert not (tmp_path / "out").exists()
