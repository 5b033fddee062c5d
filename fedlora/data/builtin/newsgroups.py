"""20 Newsgroups, split by date: 20 labels under 7 domains (comp, rec, sci, ...)."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from fedlora.assets.fetch import asset_path

HEADER_LINES = 3
FEWEST_WORDS = 5


def newsgroups_tables() -> tuple[Dataset, Dataset]:
    """Train and test rows with text, label (the newsgroup) and domain (its first part).

    Posts under five words are left out, and test posts that also are in train.
    """
    folder = asset_path("newsgroups")
    train = _posts(folder / "20newsgroups-train.tab")
    known = {text for _, text in train}
    test = [post for post in _posts(folder / "20newsgroups-test.tab") if post[1] not in known]
    return _table(train), _table(test)


def _posts(path: Path) -> list[tuple[str, str]]:
    """(newsgroup, text) of every post with enough words."""
    lines = path.read_text(encoding="utf-8").splitlines()[HEADER_LINES:]
    posts = [(label, text) for label, _, text in (line.partition("\t") for line in lines)]
    return [post for post in posts if len(post[1].split()) >= FEWEST_WORDS]


def _table(posts: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_dict(
        {
            "text": [text for _, text in posts],
            "label": [label for label, _ in posts],
            "domain": [label.partition(".")[0] for label, _ in posts],
        }
    )
