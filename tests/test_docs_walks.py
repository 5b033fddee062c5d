"""A new user's pages are gone through: their commands and Python in order, in an empty folder.

Models and data are stood in for by the smallest ones, and rounds by one; everything else is as printed.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedlora
from fedlora.cli import cli
from fedlora.config import from_keywords
from tests.docs_commands import PAGES, ROOT, blocks
from tests.models.families import save

SMALL = {"engine.name": "in-process", "num-server-rounds": 1, "train.local-steps": 2, "model.name": "tiny"}
SYNTHETIC = {"data.name": "synthetic", "data.evaluate-examples": 60}
ELSEWHERE = {
    "flower.md": "tests/federation/test_shown_app.py",
    "optimizer.md": "tests/clients/test_own_optimizer.py",
    "peft.md": "tests/models/test_own_tuner.py",
    "strategy.md": "tests/strategies/test_own_rule.py",
}
"""Pages with Python of their own kind, and the test that runs it."""
NOT_RUN = {
    "engine.md": "starts a Ray of its own in this process; tests/simulation/test_cluster.py is about that"
}


def adapters(here: Path) -> None:
    """What `serve.md` takes for granted: a classifier's adapter, and a language model's, four times."""
    base, texts = save(here / "base", "llama", "CausalLM"), here / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "the day was fine, number {n}"}}\n' for n in range(40)))
    keys = {"data.num-partitions": 2, "data.partitioner": "iid"}
    fedlora.run({**SMALL, **SYNTHETIC}, "runs/first")
    language = {"task": "causal-lm", "model.name": str(base), "data.name": str(texts), "data.max-length": 16}
    fedlora.run({**SMALL, **keys, **language}, "runs/chat")
    for name in "abc":
        shutil.copytree("runs/chat/adapter", f"hospital-{name}")


def mine(here: Path) -> None:
    """What `library.md` takes for granted: a run in ``runs/mine``, and the repository's configurations."""
    fedlora.run({**SMALL, **SYNTHETIC}, "runs/mine")
    shutil.copytree(ROOT / "experiments", here / "experiments", ignore=shutil.ignore_patterns("published"))


def reviews(here: Path) -> None:
    rows = [f"{'good' if n % 3 else 'bad'} film {n},{5 if n % 3 else 1}" for n in range(60)]
    (here / "reviews.csv").write_text("text,stars\n" + "\n".join(rows) + "\n")


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How a page is gone through.

    Attributes:
        keys: go over what its commands configure.
        python: go over what its Python configures.
        before: makes what the page takes for granted.
        leaves: what is there in the end.
        without: beginnings of its commands that are not carried out, and why.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    python: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[Path], None] = lambda here: None
    leaves: tuple[str, ...]
    without: Mapping[str, str] = field(default_factory=dict)


MAKE = {"make": "installs and downloads", "pip": "installs"}
WALKS = {
    "README.md": Walk(
        python=SYNTHETIC,
        before=reviews,
        leaves=("runs/first/adapter/adapter_model.safetensors", "runs/mine/report.html"),
        without=MAKE,
    ),
    "tutorial.md": Walk(leaves=("reviews.csv", "mine/run.toml", "runs/study/report.html", "table.tex")),
    "demo.md": Walk(
        keys={**SYNTHETIC, "study.references": "", "study.variants": ""},
        leaves=("demo.toml", "runs/demo/report.html", "runs/mine/result.json"),
        without={"make": "installs and downloads"},
    ),
    "serve.md": Walk(
        before=adapters,
        leaves=("merged/model.safetensors", "global/adapter_config.json", "small/adapter_config.json"),
        without={"vllm": "is no dependency, and was never run"},
    ),
    "library.md": Walk(before=mine, leaves=("runs/library/result.json",)),
}  # fmt: skip


def steps(text: str) -> Iterator[tuple[str, str]]:
    """The ``python`` blocks and the single commands of a page, in its order."""
    for kind, body in re.findall(r"^```(python|console)\n(.*?)^```", text, re.S | re.M):
        if kind == "python":
            yield kind, body
        else:
            yield from ((kind, line) for line in re.findall(r"^\$ (.*)$", body.replace("\\\n", " "), re.M))


def carry_out(line: str, walk: Walk) -> None:
    """A command of fedlora; its output goes where the line says."""
    words = shlex.split(line, comments=True)
    into = Path(words[words.index(">") + 1]) if ">" in words else None
    words = words[: words.index(">")] if into else words
    if words[0] in walk.without:
        return
    assert Path(words[0]).name == "fedlora", f"{line}: neither carried out nor excused"
    words = [word.replace("sentiment", "synthetic") for word in words[1:]]
    if words[0] in ("run", "compare"):
        words += [w for key, value in {**SMALL, **walk.keys}.items() for w in ("--set", f"{key}={value}")]
    if words[0] == "init":
        words += ["--model", "tiny"]
    outcome = CliRunner().invoke(cli, words)
    assert outcome.exit_code == 0, f"{line}: {outcome.output}"
    if into:
        into.write_text(outcome.stdout)


@pytest.mark.parametrize("name", WALKS)
def test_the_page_works_as_printed(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (page,) = [page for page in PAGES if page.name == name and page.parent in (ROOT, ROOT / "docs")]
    walk, run = WALKS[name], fedlora.run
    monkeypatch.chdir(tmp_path)
    walk.before(tmp_path)

    def small(*given: Any, overrides: Mapping[str, Any] | None = None, **keys: Any) -> fedlora.RunResult:
        out = {"out": keys.pop("out")} if "out" in keys else {}
        flat = {**(overrides or {}), **from_keywords(keys), **SMALL, **walk.python}
        return run(*given, overrides=flat, **out)

    monkeypatch.setattr(fedlora, "run", small)
    names: dict[str, Any] = {}
    for kind, body in steps(page.read_text()):
        if kind == "python":
            exec(compile(body, name, "exec"), names)
        else:
            carry_out(body, walk)
    for left in walk.leaves:
        assert (tmp_path / left).exists(), left


def test_all_python_of_the_pages_is_run_here_or_elsewhere() -> None:
    with_python = {page.name for page in PAGES if blocks(page.read_text(), "python")}
    assert with_python == {name for name in WALKS if name != "demo.md"} | {*ELSEWHERE, *NOT_RUN}
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / test).read_text(), f"{test} does not read {page}"
