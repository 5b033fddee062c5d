"""The first hour: a configuration of one's own data, what a run will do, and help that exists."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

import fedlora
from fedlora.cli import cli
from fedlora.config import read_config
from fedlora.wire.upload import CODECS

ROOT = Path(__file__).parent.parent
TINY = ROOT / "experiments" / "tiny.toml"
SECONDS = 2.0
"""Of processor time, far above what help takes: 0.2 s, or 0.9 s with sixteen others on two cores."""


def processor_seconds() -> float:
    """What the processes that this one started and that have ended took: waiting for a core is no fault."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    rows = [f"{'good' if n % 3 else 'bad'} film {n},{5 if n % 3 else 1},{'ab'[n % 2]}" for n in range(60)]
    (tmp_path / "reviews.csv").write_text("review,stars,site\n" + "\n".join(rows) + "\n")
    return tmp_path / "reviews.csv"


def test_init_writes_a_configuration_that_runs_and_shows_the_data(
    reviews: Path, tmp_path: Path, cache: Path
) -> None:
    done = invoke("init", tmp_path / "mine", "--data", reviews, "--model", "tiny", "--clients", "site")
    assert done.exit_code == 0, done.output
    config = read_config(tmp_path / "mine" / "run.toml")
    assert (config.task, config.data.text_column, config.data.label_column) == (
        "classification",
        "review",
        "stars",
    )
    assert (config.data.partitioner, config.data.partition_by) == ("natural", "site")
    assert "columns   review, stars, site" in done.stdout
    assert "48 examples to train on, 12 to test" in done.stdout
    assert "clients   2, 2 in a round; 24 examples each" in done.stdout
    again = invoke("init", tmp_path / "mine", "--data", reviews)
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)


def test_init_names_a_column_that_has_a_comma_in_its_name(tmp_path: Path, cache: Path) -> None:
    rows = [f"{'good' if n % 3 else 'bad'} film {n},{n % 2}" for n in range(60)]
    (tmp_path / "a.csv").write_text('"How was it, really?",label\n' + "\n".join(rows) + "\n")
    done = invoke("init", tmp_path / "mine", "--data", tmp_path / "a.csv", "--model", "tiny")
    assert done.exit_code == 0, done.output
    assert read_config(tmp_path / "mine" / "run.toml").data.text_column == "How was it, really?"
    odd = invoke("init", tmp_path / "x", "--data", tmp_path / "a.csv", "--text-column", "How, label")
    assert (odd.exit_code, "--text-column = 'How'" in odd.stderr) == (2, True)


def test_the_study_that_init_proposes_is_small(tmp_path: Path, cache: Path) -> None:
    """700 steps of 8 texts and 4,000 texts forward through MiniLM are what two cores do in three minutes."""
    rows = [f"film {n} was {'good' if n % 2 else 'bad'},{n % 2}" for n in range(3000)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    given = ("--data", tmp_path / "reviews.csv", "--model", "tiny")
    assert invoke("init", tmp_path / "mine", *given).exit_code == 0
    config = read_config(tmp_path / "mine" / "run.toml")
    runs = len(config.study.strategies.split(",")) * len(config.study.seed_list)
    rounds, clients = config.num_server_rounds, config.data.num_partitions
    test = round(3000 * config.data.test_fraction)
    assert runs * rounds * clients * config.train.local_steps <= 700
    assert runs * ((rounds - 1) * config.data.evaluate_examples + test) <= 4000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--data is missing"),
        (["--data", "nowhere.csv"], "no such file"),
        (["--data", "DATA", "--label-column", "star"], "did you mean stars?"),
        (["--data", "DATA", "--task", "classify"], "did you mean classification?"),
        (["--data", "DATA", "--clients", "cite"], "did you mean site?"),
    ],
)
def test_init_refuses_in_one_line_and_writes_nothing(
    options: list[str], words: str, reviews: Path, tmp_path: Path, cache: Path
) -> None:
    done = invoke("init", tmp_path / "mine", *(reviews if word == "DATA" else word for word in options))
    assert (done.exit_code, len(done.stderr.strip().splitlines())) == (2, 1)
    assert words in done.stderr
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("head", "row", "task", "study"),
    [
        ("text,score", "film {n},{third:.3f}", "regression", False),
        ("text,score", "film {n},{half}", "classification", True),
        ("text,stars", "film {n},{parity}", "classification", True),
        ("prompt,chosen,rejected", "a {n},good,bad", "dpo", True),
        ("prompt,response", "a {n},good", "instruction", True),
        ("note", "film {n} was fine", "causal-lm", True),
    ],
)
def test_init_proposes_the_task_that_the_columns_are_for(
    head: str, row: str, task: str, study: bool, tmp_path: Path, cache: Path
) -> None:
    rows = [row.format(n=n, third=n / 3, half=n % 5 / 2, parity=n % 2) for n in range(60)]
    (tmp_path / "data.csv").write_text("\n".join([head, *rows]) + "\n")
    done = invoke(
        "init", tmp_path / "my own", "--data", tmp_path / "data.csv", "--model", "tiny", "--max-length", 16
    )
    assert done.exit_code == 0, done.output
    assert f"fedlora run '{tmp_path / 'my own' / 'run.toml'}' --dry-run" in done.stdout
    config = read_config(tmp_path / "my own" / "run.toml")
    assert (config.task, bool(config.study.strategies)) == (task, study)


def test_a_dry_run_says_what_a_run_then_does(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    given = ("run", TINY, "--set", "strategy.name=fedavg", "--set", "lora.ranks=4", "--out", out)
    dry = invoke(*given, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not out.exists()
    said = {line[:10].strip(): line[10:] for line in dry.stdout.splitlines()}
    assert set(said) == {
        "model",
        "data",
        "labels",
        "clients",
        "training",
        "traffic",
        "privacy",
        "time",
        "memory",
    }
    assert said["privacy"] == "none"
    result = fedlora.run(str(TINY), out, overrides={
        "strategy.name": "fedavg", "lora.ranks": "4", "num-server-rounds": 1, "engine.name": "in-process",
    })  # fmt: skip
    clients, first = 4, result.records[0]
    assert said["clients"].startswith(f"{clients}, {clients} in a round")
    assert said["traffic"].startswith(
        f"{first['bytes_up'] / clients / 1e6:.3g} MB up and {first['bytes_down'] / clients / 1e6:.3g} MB down"
    )


@pytest.mark.parametrize(
    "keys",
    [{"strategy.name": "flora"}, {"strategy.init-a": "pissa"}, {"strategy.name": "ffa"}],
    ids=lambda keys: next(iter(keys.values())),
)
def test_a_dry_run_knows_what_travels(keys: dict[str, str], tmp_path: Path, cache: Path) -> None:
    """Neither what a client draws for itself, nor less than what moves the base."""
    keys = {"strategy.name": "fedavg", "lora.ranks": "4", "engine.name": "in-process", **keys}
    options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    said = invoke("run", TINY, *options, "--dry-run").stdout
    (first, *_) = fedlora.run(str(TINY), tmp_path, overrides={**keys, "num-server-rounds": 1}).records
    up, down = (f"{first[key] / 4 / 1e6:.3g} MB" for key in ("bytes_up", "bytes_down"))
    assert f"{up} up and {down} down" in said


@pytest.mark.parametrize("upload", sorted(CODECS))
def test_a_dry_run_knows_every_codec(upload: str, cache: Path) -> None:
    mean = ("--set", "strategy.name=fedavg", "--set", "lora.ranks=4")
    if upload == "seeds":
        forward = {"gradient": "forward", "optimizer": "sgd"}
        mean += tuple(word for key, value in forward.items() for word in ("--set", f"train.{key}={value}"))
    said = invoke("run", TINY, *mean, "--set", f"upload={upload}", "--dry-run")
    assert said.exit_code == 0, said.output
    assert " MB up and " in said.stdout


def test_a_dry_run_plans_epsilon(cache: Path) -> None:
    private = {"privacy.mode": "example", "privacy.target-epsilon": 4.0, "num-server-rounds": 3}
    options = [word for key, value in private.items() for word in ("--set", f"{key}={value}")]
    said = invoke(
        "run", TINY, "--set", "strategy.name=ffa", "--set", "lora.ranks=4", *options, "--dry-run"
    ).stdout
    assert "example level, epsilon 4 at delta 1e-05 for each client after at most 9 steps" in said
    assert "noise multiplier " in said


def test_a_finished_run_says_so_where_it_is_resumed(tmp_path: Path, cache: Path) -> None:
    given = (
        "run",
        TINY,
        "--set",
        "engine.name=in-process",
        "--set",
        "num-server-rounds=1",
        "--out",
        tmp_path / "out",
    )
    assert "was finished" not in invoke(*given).stdout
    again = invoke(*given, "--resume")
    assert f"{tmp_path / 'out'} was finished: all 1 rounds are done, none was added" in again.stdout
    assert "rounds 2 to 1" not in again.stderr


def test_packaged_examples_are_the_ones_of_the_checkout(tmp_path: Path) -> None:
    names = [line.split()[0] for line in invoke("example").stdout.splitlines()]
    assert "demo" in names
    for name in names:
        text = invoke("example", name).stdout
        assert text == (ROOT / "experiments" / f"{name}.toml").read_text()
        (tmp_path / f"{name}.toml").write_text(text)
    assert "did you mean demo?" in invoke("example", "dmo").stderr


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.epochs", "did you mean train.local-epochs?"),
        ("lora.rnak", "did you mean lora.rank?"),
        ("privacy.epsilon", "did you mean privacy.target-epsilon?"),
        ("rank", "did you mean lora.rank?"),
        ("data.batch-size", "did you mean train.batch-size?"),
    ],
)
def test_a_key_is_looked_for_in_its_own_table_first(key: str, meant: str) -> None:
    assert meant in invoke("run", TINY, "--set", f"{key}=1").stderr


def test_a_strategy_shows_its_options() -> None:
    said = invoke("strategies", "lora-fair").stdout
    assert "lam                 0.01" in said
    row = json.loads(invoke("strategies", "lora-fair", "--json").stdout)
    assert row["options"]["lam"] == 0.01
    assert "did you mean flora?" in invoke("strategies", "flor").stderr


def test_the_version_is_that_of_the_package() -> None:
    assert invoke("--version").stdout.strip() == f"fedlora {fedlora.__version__}"


HEAVY = ("torch", "flwr", "ray", "numpy", "pydantic", "transformers", "scipy", "pyarrow", "jinja2", "grpc")
EACH = """
import sys
from fedlora.cli import cli
for command in {commands!r}:
    try:
        cli(command)
    except SystemExit as end:
        if end.code not in (0, 2):
            raise
    heavy = [name for name in {heavy!r} if name in sys.modules]
    if heavy:
        sys.exit(f"{{command}} imports {{heavy}}")
"""
"""A process that imports something for one command shows it after that command, and ends."""


def every_command(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of each command and group of the command line."""
    group = group or get_command(cli)
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from every_command(command, (*path, name))


def test_the_command_line_has_what_the_docs_name() -> None:
    assert {("run",), ("privacy", "plan"), ("federation", "up"), ("node", "log")} <= {*every_command()}


@pytest.mark.parametrize("wrong", ["--help", "--no-such-option"])
def test_neither_help_nor_a_wrong_option_imports_anything_heavy(wrong: str) -> None:
    commands = [[*words, wrong] for words in every_command()]
    code = EACH.format(commands=commands, heavy=HEAVY)
    began = processor_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert processor_seconds() - began < SECONDS + 0.1 * len(commands)


SLOW = [["run", str(TINY), "--dry-run"], ["evaluate", "nowhere", "sentiment"], ["strategies"]]


@pytest.mark.parametrize("command", SLOW, ids=lambda command: command[0])
def test_a_terminal_has_a_line_before_anything_heavy_is_imported(command: list[str]) -> None:
    parent, child = pty.openpty()
    code = f"import sys; sys.argv = {['fedlora', *command]!r}; from fedlora.cli import main; main()"
    began = processor_seconds()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child, stdin=child)
    first = os.read(parent, 100).decode()
    process.kill()
    process.wait()
    os.close(parent)
    os.close(child)
    assert f"{command[0]} ..." in first
    assert processor_seconds() - began < SECONDS


def test_a_run_ends_with_what_all_its_rounds_took(tmp_path: Path) -> None:
    """The same lines, simulated or deployed: they are made of what is in the run directory."""
    from fedlora.cli.runs import _totals
    from fedlora.study.library import RunResult

    rounds = [{"round": n, "refused": {"3": "late"} if n == 2 else {}} for n in (1, 2)]
    record = {"rounds": 2, "seconds": 61.2, "bytes_up": 2_500_000, "bytes_down": 4_000, "epsilon": 7.94321}
    done = RunResult(path=tmp_path, config=fedlora.RunConfig(), record=record, records=rounds)
    assert _totals(done) == [
        ("rounds", "2 in 0:01:01"),
        ("traffic", "2.5 MB up, 0.004 MB down"),
        ("privacy", "epsilon 7.943 of the client that spent most"),
        ("refused", "1 updates, the last of partition 3 in round 2: late"),
    ]
