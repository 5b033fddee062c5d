from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.built_in_tokenizers import CLS, SEP, TINY_VOCAB_SIZE, TinyTokenizer
from fedlora.data.builtin.synthetic import DOMAINS, MOODS, NEUTRAL
from fedlora.data.tokenizers import PretrainedTokenizer, load_tokenizer
from fedlora.errors import ConfigError

TINY = TinyTokenizer()


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.integers(8, 20))
def test_tiny_frames_and_cuts(text: str, pair: str, max_length: int) -> None:
    [single], _ = TINY.encode([text], None, max_length)
    [double], _ = TINY.encode([text], [pair], max_length)
    for ids, ends in ((single, 1), (double, 2)):
        assert len(ids) <= max_length
        assert (ids[0], ids[-1]) == (CLS, SEP)
        assert sum(token == SEP for token in ids) == ends
        assert all(0 < token < TINY_VOCAB_SIZE for token in ids)


def test_tiny_cuts_the_end_of_the_longest_part() -> None:
    long, cut, short = "a b c d e f g h", "a b c d", "x y"
    assert TINY.encode([long], [short], 9) == TINY.encode([cut], [short], 99)
    assert TINY.encode([short], [long], 9) == TINY.encode([short], [cut], 99)


def test_tiny_ids_are_the_same_in_every_process() -> None:
    assert TINY.encode(["Quiet pond!"], None, 16) == ([[1, 753, 379, 599, 2]], None)


def test_tiny_tells_the_synthetic_words_of_each_mood_apart() -> None:
    mood_of: dict[int, set[str]] = {}
    for mood, words in [*MOODS.items(), ("", " ".join([*DOMAINS.values(), NEUTRAL]))]:
        [ids], _ = TINY.encode([words], None, 10_000)
        for token in ids[1:-1]:
            mood_of.setdefault(token, set()).add(mood)
    assert all(len(moods) == 1 for moods in mood_of.values())


def trained(directory: Path, *, pad: bool = True, eos: bool = True, longest: int = 32) -> str:
    """Save a real word-level tokenizer of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({"<u>": 0, "<p>": 1, "<e>": 2, "good": 3, "bad": 4}, unk_token="<u>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<p>"} if pad else {}
    special |= {"eos_token": "<e>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<u>", model_max_length=longest, **special
    )
    tokenizer.save_pretrained(str(directory))
    return str(directory)


def test_a_directory_gives_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained(tmp_path))
    assert tokenizer.pad_token_id == 1
    assert tokenizer.encode(["good bad good", "odd"], None, 2) == ([[3, 4], [0]], None)
    assert tokenizer.encode(["good"], ["bad bad"], 8) == ([[3, 4, 4]], None)


def test_without_padding_token_the_end_token_pads_with_one_warning(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained(tmp_path, pad=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tokenizer.pad_token_id == 2
    assert [str(w.message) for w in caught if "no padding token" in str(w.message)] == [
        str(caught[-1].message)
    ]


def test_without_padding_and_end_token_there_is_no_way(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained(tmp_path, pad=False, eos=False))
    with pytest.raises(ConfigError, match="no padding or end token"):
        _ = tokenizer.pad_token_id


def test_longer_than_the_model_takes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max-length = 64: .* at most 32 tokens"):
        load_tokenizer(trained(tmp_path)).encode(["good"], None, 64)


def test_identity_is_that_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert load_tokenizer(one).identity == load_tokenizer(two).identity
    (tmp_path / "two" / "tokenizer.json").write_text((tmp_path / "two" / "tokenizer.json").read_text() + "\n")
    assert load_tokenizer(one).identity != load_tokenizer(two).identity


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c"])
def test_no_such_directory(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.name = .*no such directory"):
        load_tokenizer(name)


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        _ = PretrainedTokenizer(tmp_path, "mine").identity


@pytest.mark.real("minilm")
def test_minilm() -> None:
    tokenizer = load_tokenizer("minilm")
    [ids], types = tokenizer.encode(["A good day."], None, 16)
    assert ids == [101, 1037, 2204, 2154, 1012, 102]
    assert types == [[0] * 6]
    assert tokenizer.pad_token_id == 0
