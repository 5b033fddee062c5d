"""Files as strangers write them, and what is read of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import DataConfig
from fedlora.data.sources import RawData, load_examples
from fedlora.errors import ConfigError

KEYS: dict[str, Any] = {"partition_by": "who", "test_fraction": 0.01}


def read(path: Path, **more: Any) -> RawData:
    return load_examples(DataConfig(name=str(path), test=str(path), **{**KEYS, **more}))


def said(raw: RawData) -> list[tuple[str, str, str]]:
    """Text, label and client of each row, as they are trained."""
    table = raw.train
    labels = [raw.label_names[label] for label in table["label"]]
    return list(zip(table["text"][:], labels, table["natural"][:], strict=True))


def refused(path: Path, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def csv_file(path: Path, rows: list[list[str]], **options: Any) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows([["text", "label", "who"], *rows])
    path.write_bytes(text.getvalue().encode())
    return path


def damaged(content: bytes) -> bytes:
    """A gzip file in which bytes have changed."""
    packed = bytearray(gzip.compress(content, mtime=0))
    packed[10:16] = b"\xff" * 6
    return bytes(packed)


def rows(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": label, "who": "ab"[i % 2]} for i, label in enumerate(labels)]
