"""Ways to spoil a file that know how it is built: JSON, JSON lines, TOML, safetensors, and bytes of any."""

from __future__ import annotations

import copy
import io
import json
import pickle
import tomllib
import zipfile
from collections.abc import Callable
from typing import Any

import tomli_w
import torch

from tests.wire.mutations import NAMES, TEXTS, Random, Trap, in_safetensors, picked

VALUES: tuple[Any, ...] = (
    *TEXTS, None, 0, -1, 1, 2**62, 2**70, 0.0, -0.5, 1e308, float("nan"), float("inf"), True, False, [], {},
    [1, 2], ["a", "b"], ["0" * 64], [[1]], {"a": 1}, "0" * 64, "/etc/passwd", "../../x", "os:system",
    "line\nline",
)  # fmt: skip


def spoiled(name: str, content: bytes, rng: Random) -> bytes:
    """A file's bytes after one to three mutations; every second one knows the format."""
    change = next((c for end, c in FORMATS.items() if name.endswith(end)), in_bytes)
    for _ in range(int(rng.integers(1, 4))):
        try:
            content = (change if rng.random() < 0.5 else in_bytes)(content, rng)
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
            content = in_bytes(content, rng)  # spoiled before, or a value that the format does not have
    return content


def in_bytes(content: bytes, rng: Random) -> bytes:
    """Bits, lengths, blocks; or something else altogether, of which some would run if it were unpickled."""
    place = int(rng.integers(len(content) + 1))
    match rng.integers(8):
        case 0 | 1:
            bits = bytearray(content)
            for at in rng.integers(len(bits), size=int(rng.integers(1, 9))) if bits else ():
                bits[at] ^= 1 << int(rng.integers(8))
            return bytes(bits)
        case 2:
            return content[:place]
        case 3:
            return content + rng.bytes(int(rng.integers(1, 400)))
        case 4:
            return content[:place] + rng.bytes(int(rng.integers(1, 40))) + content[place:]
        case 5:
            end = place + int(rng.integers(1, 400))
            return content[:place] + bytes(len(content[place:end])) + content[end:]
        case 6:
            end = place + int(rng.integers(1, 400))
            return content[:place] + content[end:]
        case _:
            return picked(TRAPS, rng)  # type: ignore[no-any-return]


def _torch_file() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": Trap()}, stream)
    return stream.getvalue()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Trap()))
    return stream.getvalue()


TRAPS = (pickle.dumps(Trap()), _torch_file(), _zip(), b"", b"\x00" * 64, b"\xff\xfe[", b"[" * 200_000)


def in_tree(tree: Any, rng: Random) -> Any:
    """One entry of nested lists and tables changed, lost, renamed or doubled."""
    tree = copy.deepcopy(tree)
    holders = [found for found in _holders(tree) if found]
    if not holders or rng.random() < 0.02:
        return picked(VALUES, rng)
    holder = picked(holders, rng)
    if isinstance(holder, list):
        at: Any = int(rng.integers(len(holder)))
        match rng.integers(3):
            case 0:
                holder[at] = picked(VALUES, rng)
            case 1:
                del holder[at]
            case _:
                holder.append(holder[at])
        return tree
    at = picked(sorted(holder), rng)
    match rng.integers(5):
        case 0 | 1:
            holder[at] = picked(VALUES, rng)
        case 2:
            del holder[at]
        case 3:
            holder[picked((*NAMES, *holder, at + "x"), rng)] = holder.pop(at)
        case _:
            old = holder[at]
            number = isinstance(old, int | float) and not isinstance(old, bool)
            holder[at] = old + picked((-1, 1, 0.5), rng) if number else picked(VALUES, rng)
    return tree


def _holders(tree: Any) -> list[Any]:
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    own = [tree] if isinstance(tree, dict | list) else []
    return own + [found for value in inside for found in _holders(value)]


def in_json(content: bytes, rng: Random) -> bytes:
    return json.dumps(in_tree(json.loads(content), rng)).encode()


def in_toml(content: bytes, rng: Random) -> bytes:
    return tomli_w.dumps(in_tree(tomllib.loads(content.decode()), rng)).encode()


def in_lines(content: bytes, rng: Random) -> bytes:
    """A line lost, doubled, moved, or changed as JSON."""
    lines = content.split(b"\n")[:-1]
    at, other = (int(rng.integers(len(lines))) for _ in range(2))
    match rng.integers(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case _:
            lines[at] = in_json(lines[at], rng)
    return b"".join(line + b"\n" for line in lines)


FORMATS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".jsonl": in_lines, ".json": in_json, ".toml": in_toml, ".safetensors": in_safetensors,
}  # fmt: skip
