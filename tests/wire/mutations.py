"""Ways to spoil a message that know how it is built: shapes, types, counts, lengths, names, settings."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Random = np.random.Generator
Mutation = Callable[[RecordDict, Random], None]

TOUCHED: list[str] = []
"""What `Trap` leaves when somebody unpickles it."""
NAMES = (
    "", ".", "/", "../../x", "a" * 5000, "base_model.model.", "base_model.model.q.lora_A.weight",
    "base_model.model.encoder.q.lora_A.weight", "encoder.q.lora_B.weight", "lora_A.weight",
    "classifier.weight",
    "base_model.model.encoder.q.lora_R.weight", "base_model.model.encoder.q.lora_magnitude_vector",
    f"{'0' * 64}/encoder.q.left", "\x00", "modules_to_save.default",
)  # fmt: skip
SHAPES: tuple[Any, ...] = ((), (0,), (-1,), (1,), (2**40,), (2**31, 2**31), (3, 8, 1), (0, 8), (1,) * 40)
DTYPES = (
    "float32",
    "float64",
    "float16",
    "int64",
    "uint8",
    "complex64",
    "object",
    "<U3",
    "bool",
    "nonsense",
    "",
)
TEXTS = (
    "", "null", "[]", "{}", "[" * 20_000, "\x00", "A,B", "B,A", "A", "C", "../..", "1e400", "ok", "missing",
    "declined", '{"epsilon": NaN}', '{"epsilon": -1}', '{"epsilon": "x"}', '{"epsilon": 1e999}',
    '{"epsilon": true}', '{"seed": 1, "init-a": "kaiming", "shapes": {"q": [0, 3]}}',
    '{"seed": 1.5, "shapes": []}',
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *TEXTS, 0, -1, 1, 2**62, 0.0, -0.5, float("nan"), float("inf"), True, b"\x80\x04.", [1, 2], ["a", "b"],
    ["0" * 64], [0.5], [True],
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    2**62,
    float("nan"),
    float("inf"),
    -float("inf"),
    -0.5,
    [1, 2],
    [float("nan")],
)


def touch(what: str) -> None:
    TOUCHED.append(what)


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, ("unpickled",)


def npy(array: Any) -> bytes:
    """In NumPy's format; of objects it is a pickle."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def forged(shape: str, descr: str, payload: bytes) -> bytes:
    """NumPy's format with a header of one's own making."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload


def picked(options: Any, rng: Random) -> Any:
    return options[int(rng.integers(len(options)))]


def _record(content: RecordDict, rng: Random) -> ArrayRecord | None:
    records = list(content.array_records.values())
    return picked(records, rng) if records else None


def _change_array(content: RecordDict, rng: Random) -> None:
    record = _record(content, rng)
    if not record:
        return
    name = picked(list(record), rng)
    old = record[name]
    dtype, shape, stype, data = old.dtype, tuple(old.shape), old.stype, old.data
    match rng.integers(9):
        case 0:
            shape = picked(SHAPES, rng)
        case 1:
            dtype = picked(DTYPES, rng)
        case 2:
            stype = picked(("", "pickle", "torch", "numpy.ndarray "), rng)
        case 3:
            data = data[: int(rng.integers(len(data) + 1))]
        case 4:
            data = data + rng.bytes(int(rng.integers(1, 400)))
        case 5:
            bits = bytearray(data)
            for place in rng.integers(len(bits), size=int(rng.integers(1, 9))) if bits else ():
                bits[place] ^= 1 << int(rng.integers(8))
            data = bytes(bits)
        case 6:
            data = picked(
                (npy(np.array([Trap()], dtype=object)), pickle.dumps(Trap()), b"", b"PK\x03\x04"), rng
            )
        case 7:
            shape = picked(("(9999999999,)", "(-1,)", "(3, 8)", "()", "(2, 2, 2)", "'x'"), rng)
            data, shape = (
                forged(shape, picked(("<f4", "|O", "<f8", "V8", "<U9", "??"), rng), data[128:]),
                old.shape,
            )
        case _:
            values = np.full((3, 8), picked((np.nan, np.inf, 1e38, 0.0), rng), dtype=np.float32)
            data = npy(values)
    record[name] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)


def _change_packed(content: RecordDict, rng: Random) -> None:
    """Tensors that travel together, see `in_safetensors`."""
    record = _record(content, rng)
    if not record or list(record) != ["safetensors"]:
        return
    try:
        spoiled = in_safetensors(record["safetensors"].numpy().tobytes(), rng)
    except Exception:
        return  # spoiled before
    record["safetensors"] = Array(np.frombuffer(spoiled, np.uint8))


def in_safetensors(content: bytes, rng: Random) -> bytes:
    """The header: what each tensor is called, its type and shape, where it lies; or the header's length."""
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = picked([key for key, value in header.items() if key != "__metadata__"], rng)
    match rng.integers(9):
        case 0:
            header[name]["dtype"] = picked(
                ("F32", "F64", "F16", "BF16", "I64", "BOOL", "X", 3, None, *DTYPES), rng
            )
        case 1:
            header[name]["shape"] = picked((*map(list, SHAPES), "x", [1.5], [[]], None), rng)
        case 2:
            header[name]["data_offsets"] = picked(([0, 4], [4, 0], [-4, 0], [0, 2**60], [0], "x", None), rng)
        case 3:
            header[picked(NAMES, rng)] = header.pop(name)
        case 4:
            other = picked([key for key in header if key != "__metadata__"], rng)
            header[name], header[other] = header[other], header[name]
        case 5:
            del header[name]
        case 6:
            header["__metadata__"] = picked(VALUES[:-7], rng)
        case 7:
            header.pop("__metadata__", None)
        case _:
            length = picked((0, 1, 2**40, 2**63, len(content)), rng)
            return length.to_bytes(8, "little") + content[8:]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def _change_names(content: RecordDict, rng: Random) -> None:
    record = _record(content, rng)
    if not record:
        return
    name = picked(list(record), rng)
    array = record[name]
    match rng.integers(3):
        case 0:
            del record[name]
        case 1:
            record[picked(NAMES, rng)] = array
        case _:
            del record[name]
            record[picked(NAMES, rng)] = array


def _change_settings(content: RecordDict, rng: Random) -> None:
    config = content.config_records.get("config")
    if not config:
        return
    name = picked([*config, "fresh", "tail-weight", "run-key", "unheard-of"], rng)
    if rng.random() < 0.3:
        config.pop(name, None)
    else:
        config[name] = picked(VALUES, rng)


def _change_metrics(content: RecordDict, rng: Random) -> None:
    metrics = content.metric_records.get("metrics")
    if metrics is None:
        return
    name = picked([*metrics, "num-examples", "unheard-of"], rng)
    if rng.random() < 0.3:
        metrics.pop(name, None)
    else:
        metrics[name] = picked(NUMBERS, rng)


def _change_records(content: RecordDict, rng: Random) -> None:
    name = picked(["arrays", "parts", "config", "metrics", "other"], rng)
    content.pop(name, None)
    match rng.integers(5):
        case 0:
            content[name] = ArrayRecord()
        case 1:
            content[name] = ConfigRecord({"text": picked(TEXTS, rng)})
        case 2:
            content[name] = MetricRecord({"number": 1})


MUTATIONS: tuple[Mutation, ...] = (
    _change_array, _change_array, _change_array, _change_packed, _change_packed, _change_names,
    _change_settings, _change_settings, _change_metrics, _change_records,
)  # fmt: skip


def mutate(content: RecordDict, rng: Random) -> str:
    """One to three mutations in place; returns what describes them."""
    chosen = [picked(MUTATIONS, rng) for _ in range(int(rng.integers(1, 4)))]
    for change in chosen:
        change(content, rng)
    return json.dumps([change.__name__ for change in chosen])
