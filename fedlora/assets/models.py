"""The built-in models as directories that transformers reads; one comes as it is, one is converted once."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from fedlora.assets.fetch import (
    announced,
    asset_identity,
    asset_path,
    cache_dir,
    create_directory,
    file_sha256,
    unchanged_sha256,
)
from fedlora.core.code import need_extra
from fedlora.core.sealed import read_sealed, sealed
from fedlora.errors import AssetError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HASHES = "sha256.json"
"""In the directory of a converted model: the hash of every file, as it was left."""
RANDOM_MODELS = ("tiny", "tiny-lm")
"""Models without files."""
BUILT_IN_MODELS = ("minilm", "tiny", "smollm2", "tiny-lm")
HUB_IDS = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""Names under which others know the built-in models that have files."""
ROUNDED = frozenset({"smollm2"})
"""Built-in models whose weights are those of their hub id rounded to 4 bits."""


def model_directory(name: str) -> Path | None:
    """The directory of a built-in model, fetched on first use; None for any other name.

    Raises:
        AssetError: it cannot be fetched, or a file changed since.
    """
    if name == "minilm":
        return asset_path(name)
    if name == "smollm2":
        home = converted_home()
        create_directory(home, lambda draft: _convert(asset_path(name), draft))
        _check_converted(home)
        return home
    return None


def converted_home() -> Path:
    """Directory of the converted SmolLM2."""
    return cache_dir() / "converted" / f"smollm2-{asset_identity('smollm2')[:12]}"


def _convert(source: Path, draft: Path) -> None:
    """GGUF with weights of 4 bits to safetensors with the same weights in float32."""
    need_extra("offline", "model.name = 'smollm2'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with (
        announced(f"converting smollm2 once into {converted_home()}"),
        redirect_stderr(io.StringIO()),  # bars of transformers and gguf
    ):
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # transformers refuses to save what it believes to be quantised still.
        model.hf_quantizer = None
        del model.config.quantization_config
        for mark in ("is_quantized", "quantization_method"):
            vars(model).pop(mark, None)
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(draft)
    hashes = {file.name: file_sha256(file) for file in sorted(draft.iterdir())}
    (draft / HASHES).write_text(json.dumps(sealed({"files": hashes})))


def _check_converted(home: Path) -> None:
    """Hold the files to what the conversion left.

    Raises:
        AssetError: one changed, or what says what they were is gone.
    """
    if not (home / HASHES).exists():
        raise AssetError(
            f"{home / HASHES}: is missing, which says what was converted, delete {home} to convert it again"
        )
    for file, expected in read_sealed(home / HASHES)["files"].items():
        if not (home / file).is_file() or unchanged_sha256(home / file) != expected:
            raise AssetError(f"{home / file}: is not what was converted, delete {home} to convert it again")
