"""`fedlora.load`, ``fedlora predict`` and ``fedlora chat`` give what the exported model gives."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from PIL import Image
from typer.testing import CliRunner, Result

import fedlora
from fedlora.cli import cli
from fedlora.data.tokenizers import load_tokenizer
from fedlora.evaluation.items import items_of
from tests.models.test_auto import exported

ELSEWHERE = """
import sys, fedlora
found = fedlora.load(sys.argv[1]).predict(["w1 w2", "w3"])
print([prediction.label for prediction in found], found[0].probability)
"""


def invoke(*arguments: object, given: str = "") -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)), input=given)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(
        tmp_path_factory.mktemp("c") / "adapter", "tiny", "classification", ("no", "yes", "maybe"), {}
    )[0]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("w") / "adapter", "tiny-lm", "instruction", (), {})[0]


def test_a_prediction_is_the_softmax_of_the_logits(classifier: Path) -> None:
    loaded, texts = fedlora.load(classifier), ["one two three", "four"]
    found = loaded.predict(texts)
    for text, prediction in zip(texts, found, strict=True):
        ids, _ = load_tokenizer("tiny").encode([text], None, 32)
        with torch.no_grad():
            row = torch.tensor(ids)
            logits = loaded.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
        wanted = dict(zip(("no", "yes", "maybe"), logits.softmax(-1).tolist(), strict=True))
        assert prediction.probabilities == pytest.approx(wanted, abs=1e-6)
        assert prediction.label == max(wanted, key=wanted.__getitem__)


def test_many_texts_are_predicted_in_their_order(classifier: Path) -> None:
    loaded, texts = fedlora.load(classifier), [f"word{n} word{n * n}" for n in range(40)]
    alone = [loaded.predict([text])[0].probability for text in texts]
    assert [p.probability for p in loaded.predict(texts)] == pytest.approx(alone, abs=1e-6)


def test_it_opens_in_another_process_and_directory(classifier: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(classifier)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here = fedlora.load(classifier).predict(["w1 w2", "w3"])
    assert done.stdout.strip() == f"{[p.label for p in here]} {here[0].probability}"


def test_the_command_takes_a_text_or_a_file(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("words,more\nfirst,x\nsecond,y\n")
    lines = invoke(
        "predict", classifier, tmp_path / "a.csv", "--text-column", "words", "--json"
    ).output.splitlines()
    assert [json.loads(line)["given"] for line in lines] == ["first", "second"]
    wanted = fedlora.load(classifier).predict(["second"])[0]
    assert json.loads(lines[1])["label"] == wanted.label
    said = f"{wanted.label} {100 * wanted.probability:.1f} %  second\n"
    assert invoke("predict", classifier, "second").output == said
    (tmp_path / "b.txt").write_text("first\n\nsecond\n")
    assert len(invoke("predict", classifier, tmp_path / "b.txt").output.splitlines()) == 2


def test_labels_and_texts_are_printed_letter_for_letter(tmp_path: Path) -> None:
    names = ("topic:key:1", "[b]x[/b]")
    adapter, _ = exported(tmp_path / "adapter", "tiny", "classification", names, {})
    text = "a:b:c\tof [red]:key:"
    found = json.loads(invoke("predict", adapter, text, "--json").stdout)
    assert (found["given"], tuple(found["probabilities"])) == (text, names)
    assert invoke("predict", adapter, text).stdout.endswith(f"%  {text}\n")
    assert "no:key:such[/b].csv: no such file" in invoke("predict", adapter, "no:key:such[/b].csv").stderr


TEXTS = "caf\u00e9 good\none\u2028text\nlast\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", TEXTS.encode()),
        ("a.txt.gz", gzip.compress(TEXTS.encode(), mtime=0)),
        ("bom.txt", TEXTS.encode("utf-8-sig")),
        ("wide.txt", TEXTS.encode("utf-16")),
        ("dos.TXT", TEXTS.replace("\n", "\r\n").encode()),
    ],
)
def test_a_text_file_is_read_as_files_of_examples_are(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert items_of(str(tmp_path / name), "text", pictures=False) == TEXTS.strip("\n").split("\n")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"good\ncaf\xe9\n", r"line 2 is not UTF-8 \(byte 0xe9\)"),
        ("a.txt", TEXTS.encode("utf-16-le"), "UTF-8"),
        ("a.txt", "good".encode("utf-16-le"), "line 1 holds a NUL"),
        ("a.txt", TEXTS.encode("utf-16")[:-1], "truncated data"),
        ("a.txt.gz", TEXTS.encode(), "Not a gzipped file"),
        ("a.txt.gz", gzip.compress(TEXTS.encode(), mtime=0)[:-12], "Compressed file ended"),
        ("a.txt.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 40, "invalid block type"),
    ],
)
def test_a_text_file_of_other_bytes_is_refused(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(fedlora.ConfigError, match=f"{name}: cannot be read .*{words}") as told:
        items_of(str(tmp_path / name), "text", pictures=False)
    assert "\n" not in str(told.value)


FRAME = pandas.DataFrame({"text": ["w1 w2"] * 5, "label": ["yes"] * 5})


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (FRAME, r"predict\(DataFrame\): is a table, takes a list of texts or of pairs of texts, such"),
        (Dataset.from_pandas(FRAME), r"predict\(Dataset\): is a table"),
        (FRAME.iterrows, "takes a list of texts"),
        ("w1", r"predict\('w1'\): takes a list"),
        (b"w1", r"predict\(b'w1' \(bytes\)\): takes a list of texts"),
        (Path("a.csv"), r"predict\(PosixPath\('a\.csv'\) \(PosixPath\)\): takes a list"),
        ({"w1": 1}, "takes a list of texts"),
        ({"w1"}, "takes a list of texts"),
        (5, r"predict\(5 \(int\)\): takes a list of texts"),
        (None, "takes a list of texts"),
        (np.array("w1"), "takes a list of texts"),
        ([("w1",)], r"predict: entry 0 is \('w1',\) \(tuple of 1\), takes a list of texts or of pairs"),
        (["w1", ("a", "b", "c")], r"predict: entry 1 is .* \(tuple of 3\)"),
        ([()], "tuple of 0"),
        ([("w1", 5)], "tuple of 2"),
        ([("w1", None)], "tuple of 2"),
        (["w1", float("nan")], r"entry 1 is nan \(float\)"),
        ([["x" * 999] * 999], r"entry 0 is .{40} \(list of 999\)"),
        ([Path("a.txt")], "entry 0 is"),
        (["a\ud800"], r"entry 0 holds half of a surrogate pair in .a\\ud800., which is no character"),
        ([("a", "b"), "c"], "not both at once"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_texts_is_refused(items: Any, words: str, classifier: Path) -> None:
    with pytest.raises(fedlora.ConfigError, match=words) as told:
        fedlora.load(classifier).predict(items)
    assert "\n" not in str(told.value)


def test_texts_come_in_whatever_has_an_order(classifier: Path) -> None:
    loaded, texts = fedlora.load(classifier), ["w1 w2", "w3"]
    wanted = loaded.predict(texts)
    given = [pandas.Series(texts, index=[7, 8]), np.array(texts), np.array(texts, object), tuple(texts)]
    assert all(loaded.predict(each) == wanted for each in [*given, iter(texts)])
    assert loaded.predict([["a", "b"]]) == loaded.predict([("a", "b")])
    assert loaded.predict([]) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["missing.csv"], "missing.csv: no such file"),
        (["missing.txt"], "missing.txt: no such file"),
        (["there.csv"], "data.text-column = 'text': no such column"),
        (["empty.txt"], "empty.txt: holds no texts"),
        ([" "], "the text is empty"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    given: list[str], words: str, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("a,b\n1,2\n")
    Path("empty.txt").write_text("\n")
    result = invoke("predict", classifier, *given)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_pictures_of_any_size_are_predicted(tmp_path: Path) -> None:
    adapter, _ = exported(
        tmp_path / "adapter", "tiny-vit", "image-classification", ("a", "b"), {"data.name": "digits"}
    )
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 255, (40 + n, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{n}.png")
    found = invoke("predict", adapter, tmp_path / "pictures", "--json")
    assert [json.loads(line)["label"] in "ab" for line in found.output.splitlines()] == [True] * 3
    with pytest.raises(fedlora.ConfigError, match=r"entry 0 is 5 \(int\), takes a list of pictures"):
        fedlora.load(adapter).predict([5])  # type: ignore[list-item]
    assert "no such picture" in invoke("predict", adapter, "none.png").stderr


def test_a_language_model_goes_on_greedily(writer: Path) -> None:
    loaded = fedlora.load(writer)
    tokenizer = load_tokenizer("tiny-lm")
    ids = list(tokenizer.pieces(["User: hi\nAssistant:"])[0])
    with torch.no_grad():
        for _ in range(5):
            row = torch.tensor([ids])
            ids.append(
                int(loaded.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -1].argmax())
            )
    assert loaded.generate("hi", max_new_tokens=5) == tokenizer.decode(ids[-5:])
    assert loaded.generate([{"role": "user", "content": "hi"}], max_new_tokens=5) == loaded.generate(
        "hi", max_new_tokens=5
    )


def test_a_chat_remembers_until_new(writer: Path) -> None:
    lines = invoke("chat", writer, "--max-new-tokens", "4", given="a\nb\n/new\nb\n\n").stdout.splitlines()
    loaded, first = fedlora.load(writer), {"role": "user", "content": "a"}
    answered = {"role": "assistant", "content": lines[0]}
    second = {"role": "user", "content": "b"}
    assert lines[1] == loaded.generate([first, answered, second], max_new_tokens=4)
    assert lines[2] == loaded.generate([second], max_new_tokens=4)


def test_what_fits_the_other_kind_is_refused(classifier: Path, writer: Path) -> None:
    assert "a classifier, ask it by fedlora predict" in invoke("chat", classifier).stderr
    with pytest.raises(fedlora.ConfigError, match="predicts no labels"):
        fedlora.load(writer).predict(["a"])
    for prompt in (5, [5], {"role": "user"}, [{"role": "user"}]):
        with pytest.raises(fedlora.ConfigError, match="takes a text, or messages with role and content"):
            fedlora.load(writer).generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(fedlora.ConfigError, match="generates no text"):
        fedlora.load(classifier).generate("a")
    with pytest.raises(fedlora.ConfigError, match="not an adapter that fedlora wrote"):
        fedlora.load(classifier.parent)
