"""The command line as a user meets it: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from fedlora.cli import cli
from fedlora.cli.console import err, marked, out, table_of
from fedlora.core.files import append_line, held
from fedlora.errors import ConfigError
from fedlora.server.directory import RunDirectory
from fedlora.server.progress import RoundProgress

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.toml")


def fedlora(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def test_a_directory_may_be_the_one_where_a_person_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = fedlora(
        "run", TINY, "--set", "engine.name=in-process", "--set", "num-server-rounds=1", "--out", "."
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "here" / "result.json").is_file()
    again = fedlora("run", TINY, "--out", "")
    assert (again.exit_code, again.stderr) == (
        2, "error: --out .: is not empty (use --resume to go on, or another directory)\n",
    )  # fmt: skip


def test_a_narrow_terminal_cuts_no_cell_of_a_table() -> None:
    rows = [["zero-padding[red]", "12,345", "because it is said at length"], ["b", "1", "so"]]
    screen = io.StringIO()
    found = table_of(["strategy", "examples", "why"], rows, left=["strategy"], folded="why", room=24)
    Console(file=screen, width=24, soft_wrap=True).print(found)
    words = " ".join(["strategy examples why", *map(" ".join, rows)]).split()
    assert screen.getvalue().split() == words


AS_IT_IS = "a[/b] x[lr=0.1] topic:key:1"


def test_what_is_no_text_of_ours_is_printed_letter_for_letter(capsys: pytest.CaptureFixture[str]) -> None:
    for console in (out, err):
        console.print(AS_IT_IS)
        console.print(marked(AS_IT_IS, AS_IT_IS))
        console.print(table_of([AS_IT_IS], [[AS_IT_IS]], left=[AS_IT_IS]))
    record = {"round": 1, "seconds": 1.0, "refused": {0: AS_IT_IS}}
    with RoundProgress(AS_IT_IS, 1) as progress:
        progress.begin(0, {1: AS_IT_IS})
        progress.update(record)
    told = capsys.readouterr()
    assert told.out.count(AS_IT_IS) == 5
    assert told.err.count(AS_IT_IS) == 5 + 6


def test_results_may_be_in_a_directory_with_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("--set", "num-server-rounds=1")
    done = fedlora("run", TINY, *IN_PROCESS, *few, "--out", "x[lr=0.1]/a[/b]")
    assert done.exit_code == 0, done.output
    assert "results in x[lr=0.1]/a[/b], adapter in x[lr=0.1]/a[/b]/adapter\n" in done.stdout


IN_PROCESS = ("--set", "engine.name=in-process")
"""Where a request gets as far as its data or model, so that no Ray is started for it."""
BAD_REQUESTS = {
    "unknown key": (["--set", "lora.rnak=4"], "lora.rnak", "lora.rank"),
    "wrong type": (["--set", "lora.rank=four"], "lora.rank = 'four'", "valid integer"),
    "impossible value": (["--set", "fraction-train=1.5"], "fraction-train = 1.5", "<= 1"),
    "unknown strategy": (["--set", "strategy.name=fedavgg"], "'fedavgg'", "did you mean fedavg?"),
    "unknown option": (["--set", 'strategy.options={"lam": 1}'], "lam", "flora accepts init_a"),
    "option of another type": (
        ["--set", "strategy.name=lora-fair", "--set", 'strategy.options={"lam": "x"}'], "lam = 'x'",
        "expects float",
    ),
    "unknown partitioner": (["--set", "data.partitioner=random"], "'random'", "dirichlet"),
    "more partitions than examples": (
        ["--set", "data.partitioner=iid", "--set", "data.num-partitions=100000"], "100000", "examples",
    ),
    "rank larger than the layer": (["--set", "lora.ranks=33"], "33", "at most 32"),
    "target modules that match nothing": (["--set", "lora.target-modules=q_proj"], "q_proj", "query"),
    "missing column": (["--set", "data.label-column=stars"], "", ""),
    "mixed ranks refused": (["--set", "strategy.name=fedavg"], "fedavg needs equal ranks", "flora"),
    "ranks that are no numbers": (["--set", "lora.ranks=2,x"], "lora.ranks = '2,x'", "whole number"),
    "bad groups": (["--set", 'client-groups=[{"rank": 2}]'], "client-groups", "partitions is missing"),
    "not json": (["--set", "strategy.options={"], "strategy.options", "not JSON"),
    "init": (["--set", "strategy.init-a=zeros"], "'zeros'", "kaiming, orthonormal"),
    "epsilon": (["--set", "privacy.target-epsilon=-1"], "privacy.target-epsilon = -1", "> 0"),
    "no such model": (["--set", "model.name=/nowhere"], "/nowhere", "model.name"),
    "no such data": (["--set", "data.name=/nowhere.jsonl"], "/nowhere.jsonl", "no such file"),
    "partitions that do not exist": (["--set", "partitions=9"], "partitions = '9'", "0 to 3"),
    "a set without =": (["--set", "lora.rank"], "lora.rank", "key=value"),
    "batch over the examples": (
        ["--set", "privacy.mode=example", "--set", "train.batch-size=5000"], "5000", "examples",
    ),
    "two clippings": (
        ["--set", "privacy.mode=example", "--set", "train.max-grad-norm=1.0"], "train.max-grad-norm",
        "must be 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in BAD_REQUESTS if n != "missing column"])
def test_a_bad_request_is_one_line_with_exit_code_2(name: str, tmp_path: Path, cache: Path) -> None:
    arguments, *words = BAD_REQUESTS[name]
    out = tmp_path / "out"
    result = fedlora("run", TINY, "--out", str(out), *IN_PROCESS, *arguments)
    assert result.exit_code == 2, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert sum(text.startswith("error") for text in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in line
    assert not (out / "rounds.jsonl").exists()


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, cache: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "stars": 1}\n{"text": "b", "stars": 0}\n')
    result = fedlora("run", TINY, "--out", str(tmp_path / "out"), "--set", f"data.name={data}", *IN_PROCESS)
    assert result.exit_code == 2
    line = result.stderr.strip().splitlines()[-1]
    assert "label" in line
    assert "stars" in line


def test_a_directory_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    result = fedlora("run", TINY, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "is not empty" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    "left", [{}, {"rounds.jsonl": '{"round": 1}\n'}, {"clients": None}, {"own.txt": "keep"}]
)
def test_a_try_without_a_round_leaves_its_directory_to_the_next(
    left: dict[str, str | None], tmp_path: Path
) -> None:
    tried = {"config.toml": "seed = 7\n", "provenance.json": "{}", "run-key.txt": "k", "rounds.jsonl": ""}
    for name, text in (tried | left).items():
        (tmp_path / name).mkdir() if text is None else (tmp_path / name).write_text(text)
    if left:
        with pytest.raises(ConfigError, match="is not empty"):
            RunDirectory(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {*tried, *left}
    else:
        RunDirectory(tmp_path)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_directory_that_another_process_writes_into_is_refused(command: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with held(out):
        result = fedlora(command, TINY, "--out", str(out), "--resume")
    assert result.exit_code == 2
    assert "another fedlora writes there" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


WRITING: dict[str, tuple[str, ...]] = {
    "run": ("run", TINY, "--out", "PLACE"),
    "compare": ("compare", TINY, "--out", "PLACE"),
    "aggregate": ("aggregate", "--strategy", "fedavg", "--out", "PLACE", "a"),
    "federation init": ("federation", "init", "PLACE", "--nodes", "1"),
    "privacy new-dataset": ("privacy", "new-dataset", "--ledger", "PLACE", "--id", "a", "--reason", "b"),
}


@pytest.mark.parametrize("place", ["file/below", "link/below", "/proc/below"])
@pytest.mark.parametrize("command", WRITING)
def test_a_place_that_cannot_be_written_is_one_line(command: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to("nowhere")
    result = fedlora(*(str(tmp_path / place) if word == "PLACE" else word for word in WRITING[command]))
    assert (result.exit_code, result.exception.__class__) == (2, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / place) in line
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "link"}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("keep")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "file" / "cache"))
    result = fedlora("pretrain", "vit")
    assert result.exit_code == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: FEDLORA_CACHE: {tmp_path / 'file' / 'cache'}")
    assert line.endswith(f"cannot be written in {tmp_path / 'file'} (Not a directory)")


def test_a_full_disk_is_one_line_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment of a command."""

    def full(*_: object, **__: object) -> None:
        append_line(tmp_path / "rounds.jsonl", "{}")

    (tmp_path / "rounds.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("fedlora.simulation.simulate.simulate", full)
    result = fedlora("run", TINY, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    expected = f"error: {tmp_path / 'rounds.jsonl'}: No space left on device; what was written before is kept"
    assert result.stderr.strip() == expected


def test_sigterm_ends_a_run_as_an_interrupt_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, before = [], signal.getsignal(signal.SIGTERM)

    def ended(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does to the process's group
            closed.append("engine")

    monkeypatch.setattr("fedlora.simulation.simulate.simulate", ended)
    result = fedlora("run", TINY, "--out", str(tmp_path / "out"))
    assert (result.exit_code, closed) == (1, ["engine"])
    assert result.stderr.strip() == "interrupted; what was written stays, go on with --resume"
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_what_can_be_resumed_says_so_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora.study.library.evaluate", ended)
    assert fedlora("evaluate", "a", "b.csv").stderr.strip() == "interrupted; what was written stays"


def test_a_line_that_stands_twice_is_dropped_on_resume(tmp_path: Path) -> None:
    """As a copy of a file's end leaves it; `python -m tests.fuzz` found it."""
    directory = RunDirectory(tmp_path / "run")
    for number in (1, 2, 2, 3):
        directory.append_round({"round": number})
    directory.keep_rounds(2)
    assert directory.rounds() == [{"round": 1}, {"round": 2}]


@pytest.mark.parametrize("text", ["", "[model", "\x00"])
def test_a_file_that_is_no_toml_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text or "seed = [1, 2]")
    result = fedlora("run", str(path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = fedlora("run", str(tmp_path / "none.toml"))
    assert result.exit_code == 2
    assert "there is no such file" in result.stderr


def test_the_facts_are_json() -> None:
    rows = json.loads(fedlora("strategies", "--json").stdout)
    assert {"fedavg", "ffa", "flora", "lora-fair", "fedsvd", "head-only"} <= {row["name"] for row in rows}
    assert all(
        {"exact", "mixed_ranks", "trained", "uploaded", "paper", "supported_inits"} <= row.keys()
        for row in rows
    )


@pytest.mark.parametrize(
    "command", ["run", "compare", "evaluate", "strategies", "probe", "pretrain", "aggregate"]
)
def test_every_help_text_has_an_example(command: str) -> None:
    assert f"Example: fedlora {command} " in fedlora(command, "--help").stdout


def test_an_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = fedlora("evaluate", str(tmp_path), "synthetic")
    assert result.exit_code == 2
    assert "error: " in result.stderr
