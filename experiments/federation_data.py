"""Writes each domain's training sentences into a file of its own, as data holders would have them.

python -m experiments.federation_data runs/federation/data
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedlora.config import DataConfig
from fedlora.data.sources import load_examples


def write_domains(folder: Path, config: DataConfig) -> list[Path]:
    """One jsonl file for each domain of the training examples, in the order of their names."""
    raw = load_examples(config)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {}
    for row in raw.train:
        example = {"text": row["text"], "label": raw.label_names[row["label"]]}
        rows.setdefault(row["domain"], []).append(json.dumps(example, ensure_ascii=False))
    files = []
    for domain in sorted(rows):
        files.append(folder / f"{domain}.jsonl")
        files[-1].write_text("\n".join(rows[domain]) + "\n")
    return files


if __name__ == "__main__":
    for file in write_domains(Path(sys.argv[1]), DataConfig()):
        print(file)
