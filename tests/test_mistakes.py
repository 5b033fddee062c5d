"""Mistakes that people make, and the one line that each of them gets: what, its value, what is accepted."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedlora
from fedlora.cli import cli

PLAN = ("privacy", "plan", "--dataset-size", "1000", "--local-steps", "1", "--rounds", "1")
CONFIG = """\
num-server-rounds = 1
[model]
name = "tiny"
[engine]
name = "in-process"
[train]
local-steps = 1
[data]
name = "good.csv"
partitioner = "iid"
num-partitions = 2
"""


def rows(separator: str = ",", *, head: str = "text,label", labels: str = "ab", count: int = 40) -> str:
    lines = [f"film {i}{separator}{labels[i % len(labels)]}" for i in range(count)]
    return "\n".join([head.replace(",", separator), *lines]) + "\n"


FILES: dict[str, str | bytes] = {
    "good.csv": rows(),
    "semicolon.csv": rows(";"),
    "tabs.csv": rows("\t"),
    "commas.tsv": rows(),
    "latin.csv": rows().replace("film", "caf\u00e9").encode("latin-1"),
    "excel.xlsx": b"PK\x03\x04" + bytes(400),
    "excel.csv": b"PK\x03\x04" + bytes(400),
    "words.docx.txt": "film",
    "empty.csv": "",
    "heading.csv": rows(count=0),
    "headless.csv": rows(head="film a,a"),
    "one.csv": rows(labels="a"),
    "blank.csv": rows().replace("film 17,b", "film 17,"),
    "ragged.csv": "text,label\nfine,good\nfine, but long,bad\n",
    "comma.jsonl": '{"text": "a", "label": "x"}\n{"text": "b" "label": "y"}\n',
    "c.toml": CONFIG,
    "twice.toml": CONFIG + '[data]\nname = "good.csv"\n',
    "quotes.toml": CONFIG.replace('"tiny"', "tiny"),
    "table.toml": CONFIG + "[traning]\nlocal-steps = 1\n",
    "study.toml": CONFIG + '[study]\nstrategies = "fedavg,flroa"\n',
    "node/node.toml": "partition-id = 0\nmax-epsilno = 3.0\n",
}
DATA: dict[str, tuple[str, ...]] = {
    "semicolon.csv": ("data.name = 'semicolon.csv'", "'text;label' is one column", "not by ';'"),
    "tabs.csv": ("data.name = 'tabs.csv'", "is one column"),
    "commas.tsv": ("data.name = 'commas.tsv'", "not by ','"),
    "latin.csv": ("line 2 is not UTF-8", "save the file as UTF-8"),
    "excel.xlsx": ("data.name = 'excel.xlsx'", "an Excel file, save it as csv"),
    "excel.csv": ("data.name = 'excel.csv'", "an Excel file, save it as csv"),
    "words.docx.txt": ("must end in .jsonl", ".csv"),
    "empty.csv": ("the file is empty", "first line must name the columns"),
    "heading.csv": ("'heading.csv' holds no examples",),
    "headless.csv": ("data.text-column = 'text'", "no such column", "it has film a, a"),
    "one.csv": ("data.label-column = 'label'", "one label only, 'a'"),
    "blank.csv": ("data.label-column = 'label'", "1 empty", "in row 18"),
    "ragged.csv": ("line 3 has 3 fields, the header has 2",),
    "comma.jsonl": ("line 2: Expecting ',' delimiter",),
    "nowhere.csv": ("data.name = 'nowhere.csv': no such file", "a directory, a hub id"),
}
KEYS: dict[str, tuple[str, ...]] = {
    "lora.rnak=4": ("lora.rnak = 4", "did you mean lora.rank?"),
    "rounds=3": ("did you mean num-server-rounds?",),
    "strategy=flora": ("did you mean strategy.name?",),
    "lora.rank=four": ("lora.rank = 'four'", "integer"),
    "lora.rank=4.5": ("lora.rank = 4.5", "integer"),
    "lora.rank 4": ("--set lora.rank 4", "key=value"),
    "num-server-rounds=-1": ("num-server-rounds = -1", "> 0"),
    "fraction-train=50": ("fraction-train = 50", "<= 1"),
    "min-train-nodes=5": ("min-train-nodes = 5", "only 2 clients"),
    "train.learning-rate=fast": ("train.learning-rate = 'fast'", "number"),
    "train.optimizer=adma": ("did you mean adamw?",),
    "strategy.name=fedvag": ("did you mean fedavg?",),
    "strategy.name=nowhere:Rule": ("'nowhere:Rule': cannot be imported", "No module named 'nowhere'"),
    'strategy.options={"lam": 1}': ("strategy.options lam = 1", "fedavg accepts"),
    "strategy.options=lam=1": ("strategy.options = 'lam=1'", "not JSON"),
    "lora.ranks=4,8": ("fedavg needs equal ranks", "flora"),
    "lora.target-modules=q_proj": ("'q_proj'", "bert has query, key, value"),
    "task=classify": ("did you mean classification?",),
    "task=causal-lm": ("model.name = 'tiny': it is no causal language model", "smollm2"),
    "model.name=./model": ("model.name = './model': no such directory",),
    "model.quantization=8bit": ("did you mean 4bit?",),
    "engine.device=gpu": ("engine.device = 'gpu'", "cuda"),
    "engine.name=rya": ("did you mean ray?",),
    "privacy.mode=exmaple": ("did you mean example?",),
    "privacy.target-delta=2": ("privacy.target-delta = 2", "0.01"),
    "secure.mode=on": ("secure.mode = 'on'", "sums"),
    "data.label-column=stars": ("data.label-column = 'stars'", "it has text, label"),
    "data.num-partitions=1000": ("data.num-partitions = 1000", "only 32 training examples"),
    "data.test-fraction=20": ("data.test-fraction = 20", "< 1"),
    "data.max-length=100000": ("data.max-length = 100000", "at most 512 tokens"),
    "data.test=semicolon.csv": ("data.test = 'semicolon.csv'", "not by ';'"),
}
COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("rnu", "c.toml"): ("No such command 'rnu'", "Did you mean 'run'?"),
    ("run",): ("Missing argument 'CONFIG.toml'", "fedlora run --help"),
    ("run", "c.toml", "--outt", "x"): ("No such option '--outt'", "Did you mean '--out'?"),
    ("run", "c.toml", "--max-rank", "0"): ("'--max-rank': 0 is not in the range x>=1",),
    ("run", "nowhere.toml"): ("nowhere.toml: there is no such file",),
    ("run", "."): (".: is a directory, name a TOML file",),
    ("run", "good.csv"): ("good.csv: not a TOML file",),
    ("run", "twice.toml"): ("Cannot declare ('data',) twice", "line 12"),
    ("run", "quotes.toml"): ("quotes.toml: not a TOML file", "line 3"),
    ("run", "table.toml"): ("traning.local-steps = 1", "did you mean train.local-steps?"),
    ("run", "c.toml", "--out", "run"): ("--out run: is not empty", "--resume"),
    ("run", "c.toml", "--out", "good.csv"): ("--out good.csv: is a file, name a directory",),
    ("run", "c.toml", "--out", "run", "--resume", "--set", "lora.rank=4"): (
        "lora.rank = 4: the run in run has 8",
    ),
    ("run", "c.toml", "--out", "f", "--federation", "run"): (
        "run: no federation there", "fedlora federation init",
    ),
    ("compare", "c.toml", "--out", "s"): ("study.strategies = ''", "name at least one"),
    ("compare", "study.toml", "--out", "s"): ("'flroa'", "did you mean flora?"),
    ("compare", "study.toml", "--out", "s", "--set", "study.seeds=1,two"): ("'two' is not a whole number",),
    ("init", "mine"): ("--data is missing",),
    ("init", "mine", "--data", "semicolon.csv"): ("not by ';'",),
    ("init", "good.csv", "--data", "good.csv"): ("DIR good.csv: is a file, name a directory",),
    ("init", "mine", "--data", "good.csv", "--clients", "-3"): ("--clients = '-3'", "a number of clients"),
    ("predict", "run", "a film"): ("run/fedlora.json: is missing", "the run's adapter is in run/adapter"),
    ("predict", "run/adapter", "semicolon.csv"): ("not by ';'",),
    ("chat", "run/adapter"): ("a classifier, ask it by fedlora predict",),
    ("evaluate", "run/adapter"): ("name a dataset after the adapter",),
    ("evaluate", "run/adapter", "nowhere.csv"): ("no such file",),
    ("aggregate", "run/adapter", "--out", "a"): ("Missing option '--strategy'",),
    ("aggregate", "run/adapter", "no", "--strategy", "fedavg", "--out", "a"): ("no: no such directory",),
    ("aggregate", "run/adapter", "run/adapter", "--strategy", "fedavg", "--weights", "1", "--out", "a"): (
        "--weights = 1: 1 weights for 2 adapters",
    ),
    ("aggregate", "run/adapter", "run/adapter", "--strategy", "fedavg", "--merge", "--out", "a"): (
        "--merge: the adapters' base is not named", "give --base",
    ),
    ("strategies", "flro"): ("did you mean flora?",),
    ("example", "tinny"): ("did you mean tiny?",),
    ("pretrain", "vitt"): ("did you mean vit?",),
    ("forget", "run", "--partition", "9", "--out", "a"): ("--partition 9: took part in no round",),
    ("privacy", "spent", "run"): ("run: there is no privacy ledger in it",),
    (*PLAN, "--batch-size", "2000", "--target-epsilon", "8", "--target-delta", "1e-5"): (
        "--batch-size = 2000", "at most --dataset-size",
    ),
    (*PLAN, "--batch-size", "20", "--target-epsilon", "8"): ("Missing option '--target-delta'",),
    (*PLAN, "--batch-size", "20", "--target-epsilon", "-8", "--target-delta", "1e-5"): (
        "--target-epsilon = -8", "> 0",
    ),
    ("node", "log", "run"): ("run: there is no node.toml in it",),
    ("federation", "check", "node"): ("node.toml: max-epsilno = 3.0", "did you mean max-epsilon?"),
    ("federation", "up", "run"): ("run: no federation there",),
    ("federation", "init", "net", "--nodes", "2", "--data", "good.csv"): ("--data", "2"),
    ("watch", "run", "--port", "PORT"): ("--port", "Address already in use"),
    ("watch", "run", "--port", "abc"): ("'--port': 'abc' is not a valid integer",),
}  # fmt: skip
MISTAKES = [
    *((("run", "c.toml", "--set", f"data.name={name}", "--out", "o"), words) for name, words in DATA.items()),
    *((("run", "c.toml", "--set", key, "--out", "o"), words) for key, words in KEYS.items()),
    *COMMANDS.items(),
]


def written(home: Path) -> list[Path]:
    """What is there, but for locks, and ``o`` that is made for a run and left empty to the next try."""
    return [p for p in sorted(home.rglob("*")) if p.suffix != ".lock" and p != home / "o"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the configuration, and the files, in one folder."""
    home = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name, content in FILES.items():
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_bytes(content.encode() if isinstance(content, str) else content)
        fedlora.run("c.toml", "run")
    return home


@pytest.mark.parametrize(
    ("command", "words"), MISTAKES, ids=[" ".join(command)[:60] for command, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_nothing_is_started(
    command: tuple[str, ...], words: tuple[str, ...], run: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.chdir(run)
    before = written(run)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(cli, [port if word == "PORT" else word for word in command])
    lines = [line for line in done.stderr.splitlines() if not line.startswith("encoding ")]
    assert (done.exit_code, len(lines)) == (2, 1), done.output
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert written(run) == before


def test_there_are_many_of_them_and_a_request_that_is_right_is_not_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert len(MISTAKES) >= 80
    monkeypatch.chdir(run)
    done = CliRunner().invoke(cli, ["run", "c.toml", "--out", "right", "--set", "privacy.noise-multiplier=1"])
    assert done.exit_code == 0, done.output
    assert (
        "privacy   none, and privacy.noise-multiplier = 1.0 without privacy.mode does nothing" in done.output
    )
    shutil.rmtree(run / "right")
