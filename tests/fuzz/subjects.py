"""What is spoiled, and what reads it: run directories, nodes, ledgers, adapters.

A subject's ``read`` gives all that a program takes from its files. A spoiled file may be refused in one line
that names it, or be read as what was there before; anything else passes silently.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w
import torch

from clients.journal import read_journal
from clients.node_settings import FLOWERS_OWN, NODE_FILE, NodeSettings, read_node
from clients.owner import _evaluations_done
from clients.store import OWN, ClientStore
from fedlora.config import ModelConfig, from_flat, to_flat
from fedlora.config.section import by_field
from fedlora.core.base_patches import digest
from fedlora.core.factors import LoraFactors
from fedlora.core.sealed import sealed
from fedlora.core.state import ServerState, State
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.layout import SERVER_FILE, declared_examples_of, open_layout, roll_of
from fedlora.models.card import AdapterCard
from fedlora.models.export import save_adapter
from fedlora.models.peft_files import read_adapter
from fedlora.privacy.datasets import Dataset
from fedlora.privacy.ledger import Ledger, read_ledgers
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.provenance import check_schema
from fedlora.server.results import read_samples
from fedlora.simulation.in_process import InProcessEngine
from fedlora.study.execute.reuse import STUDY
from fedlora.study.execute.runner import _looks, _write_record
from fedlora.study.library.runs import load_run
from tests.privacy.ledgers import BUDGET, release

RUN: dict[str, Any] = {
    "model.name": "tiny", "data.name": "synthetic", "data.evaluate-examples": 8, "lora.rank": 2,
    "train.local-steps": 1, "train.batch-size": 2, "engine.name": "in-process", "num-server-rounds": 3,
    "strategy.name": "flora",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """Files of one kind.

    Attributes:
        make: writes them into a new directory.
        read: what a program takes from them.
        names: patterns of the files that are spoiled.
        by_hand: people write these files, so that another value is what they ask for: what was read is
            compared with this plain reading of the spoiled file instead.
        may_be_lost: patterns of files without which there is nothing to be read, as documented: what is lost
            is sent again, begun anew, or never was.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    names: tuple[str, ...]
    by_hand: Callable[[Path], Any] | None = None
    may_be_lost: tuple[str, ...] = ()


def make_run(home: Path) -> None:
    run = FederatedRun(InProcessEngine().session(from_flat(RUN), home), RunDirectory(home))
    run.directory.write_samples("before", [{"prompt": "a", "text": "b"}])
    run.directory.write_before({"accuracy": 0.5, "loss": 1.0})
    run.run()


def resumed(home: Path) -> Any:
    """All that ``--resume`` goes on from."""
    directory, config = RunDirectory(home, resume=True), from_flat({**RUN, "num-server-rounds": 4})
    found = directory.load_checkpoint()
    assert found is not None
    directory.open(config, None, continues=True)
    directory.keep_rounds(found.state.round)
    identity = json.loads((home / "provenance.json").read_text())["identity"]
    return _state(found), directory.run_key(), directory.before(), directory.rounds(), identity


def _state(found: ServerState) -> Any:
    state = found.state
    tensors = {f"{m}.{side}": t for m, a in state.adapters.items() for side, t in a.tensors().items()}
    tensors |= {f"head.{n}": t for n, t in state.head.items()}
    tensors |= {f"memory.{n}": t for n, t in state.memory.items()}
    plain = {k: v for k, v in asdict(found).items() if k not in ("state", "in_flight", "noise")}
    scalings = {m: a.scaling for m, a in state.adapters.items()}
    return digest(tensors), [p.digest() for p in state.base], state.round, state.seed, scalings, plain


def shown(home: Path) -> Any:
    """All that a report takes from a finished run."""
    found = load_run(home)
    return found.record, found.records, to_flat(found.config), read_samples(home)


PARTS = [{"a.left": torch.arange(6.0).reshape(3, 2) + n, "a.right": torch.ones(2, 3)} for n in range(3)]


def make_store(home: Path) -> None:
    store = ClientStore(home)
    for part in PARTS:
        store.keep(digest(part), part)
    for number in (1, 2):
        store.keep_personal(0, OWN, number, {"b": torch.arange(6.0) + number})
        store.note_named(number, [digest(PARTS[number])])


def kept(home: Path) -> Any:
    """What a client has; a part that it does not find whole is sent again, and is then whole."""
    store, found = ClientStore(home), []
    for part in PARTS:
        if not store.has(digest(part)):
            (home / "parts" / f"{digest(part)}.safetensors").unlink(missing_ok=True)
            store.keep(digest(part), part)
        got = store.get(digest(part))
        assert got is not None
        found.append(digest(got))
    own = store.personal(0, OWN, 3)
    store.note_named(9, [digest(PARTS[0])])
    outside = (home.parent / "outside.safetensors").exists()
    return found, None if own is None else digest(own), outside


def make_node(home: Path) -> None:
    values = {"partition-id": 1, "data": "/srv/a.jsonl", "dataset-id": "notes", "max-epsilon": 8.0,
              "max-evaluations": 3, "evaluation-epsilon": 0.5, "allow": "/srv/b, m:C"}  # fmt: skip
    (home / NODE_FILE).write_text(tomli_w.dumps(values))


def node(home: Path) -> Any:
    settings = read_node(home)
    return {name: getattr(settings, name) for name in by_field(_table(home / NODE_FILE))}


def node_by_hand(home: Path) -> Any:
    """Where a number with a fraction is asked for, a whole one is the nearest such."""
    fractions = {field.name for field in fields(NodeSettings) if isinstance(field.default, float)}
    table = by_field(_table(home / NODE_FILE))
    return {name: float(value) if name in fractions else value for name, value in table.items()}


def _table(file: Path) -> dict[str, Any]:
    return {k: v for k, v in tomllib.loads(file.read_text()).items() if k not in FLOWERS_OWN}


def federation(home: Path) -> Any:
    layout, file = open_layout(home), home / "server" / SERVER_FILE
    rest = {"host": layout.host, "port": layout.port, "control-port": layout.control_port}
    return rest, roll_of(file), declared_examples_of(file)


def federation_by_hand(home: Path) -> Any:
    table = tomllib.loads((home / "server" / SERVER_FILE).read_text())
    nodes = table["nodes"]
    roll = {n["fingerprint"]: n["partition-id"] for n in nodes}
    declared = {n["partition-id"]: n["declared-examples"] for n in nodes if "declared-examples" in n}
    return {key: table[key] for key in ("host", "port", "control-port")}, roll, declared


DATASET = Dataset(source="notes", partitioning="", part="", fingerprint="f" * 64)


def make_study(home: Path) -> None:
    _write_record(from_flat(RUN), home, looks=[2, 3])


def looked(home: Path) -> Any:
    """With how many seeds a study was reported on, which its next report pays for."""
    check_schema(home / STUDY)
    return _looks(home)


def make_ledger(home: Path) -> None:
    ledger = Ledger(home / "ledger", DATASET)
    for number in (1, 2, 3):
        ledger.reserve(release(number), BUDGET)
        ledger.released(release(number))


def spent(home: Path) -> Any:
    """What a node's ledgers say is spent."""
    ledger = Ledger(home / "ledger", DATASET)
    ledger.check()
    accounts = [(a.identity, a.unit, a.standing.epsilon) for a in read_ledgers(home / "ledger")]
    return ledger.standing().epsilon, accounts


def make_evaluations(home: Path) -> None:
    (home / "evaluations.json").write_text(json.dumps(sealed({"done": 3})) + "\n")


def make_journal(home: Path) -> None:
    entry = {"time": "t", "run": "r", "strategy": "fedavg", "round": 1, "asked": "train", "status": "ok",
             "bytes": 12, "metrics": {}, "epsilon": None, "reason": ""}  # fmt: skip
    (home / "sent.jsonl").write_text("".join(json.dumps({**entry, "round": n}) + "\n" for n in (1, 2, 3)))


def journal(home: Path) -> None:
    """Its lines are for the owner to read, and have no hash; they are lines of a journal, or refused."""
    read_journal(home)


def make_adapter(home: Path) -> None:
    g = torch.Generator().manual_seed(0)
    adapters = {
        f"encoder.{name}": LoraFactors(torch.randn(2, 8, generator=g), torch.randn(6, 2, generator=g), 2.0)
        for name in "qv"
    }
    state = State(round=1, adapters=adapters, head={"classifier.weight": torch.ones(2, 6)})
    card = AdapterCard(model=ModelConfig(name="tiny"), label_names=("a", "b"), max_length=8, seed=1)
    save_adapter(home / "adapter", state, {}, card)


def adapter(home: Path) -> Any:
    found = read_adapter(home / "adapter")
    tensors = {f"{m}.{side}": t for m, f in found.adapters.items() for side, t in f.tensors().items()}
    scalings = {m: f.scaling for m, f in found.adapters.items()}
    return digest(tensors), digest(found.head), scalings, found.card, found.config.modules_to_save


def of_a_stranger(home: Path) -> None:
    """Without fedlora's card nothing vouches for what the numbers are; they are read as they stand."""
    make_adapter(home)
    (home / "adapter" / "fedlora.json").unlink()


def strangers(home: Path) -> Any:
    """Only what any adapter that is read must be: of one rank by module, and finite."""
    for factors in read_adapter(home / "adapter").adapters.values():
        assert all(bool(torch.isfinite(t).all()) for t in factors.tensors().values())
        assert factors.A.shape[0] == factors.B.shape[1]
    return None


SUBJECTS = {
    "checkpoint": Subject(
        make_run, resumed,
        ("checkpoint/*", "rounds.jsonl", "config.toml", "provenance.json", "run-key.txt", "before.json"),
    ),
    "finished run": Subject(
        make_run, shown, ("result.json", "rounds.jsonl", "config.toml", "samples.json", "provenance.json")
    ),
    "client's parts": Subject(
        make_store, kept, ("parts/*", "personal/*/*", "named/*"), may_be_lost=("personal/*/*",)
    ),
    "node.toml": Subject(make_node, node, (NODE_FILE,), node_by_hand),
    "federation.toml": Subject(
        lambda home: create(home / "f", 2), lambda home: federation(home / "f"), ("f/server/*.toml",),
        lambda home: federation_by_hand(home / "f"),
    ),
    "study": Subject(make_study, looked, (STUDY,)),
    "ledger": Subject(make_ledger, spent, ("ledger/*", "ledger.heads/*")),
    "evaluations": Subject(
        make_evaluations, lambda home: _evaluations_done(home / "evaluations.json"), ("*.json",),
        may_be_lost=("*",),
    ),
    "journal": Subject(make_journal, journal, ("*.jsonl",)),
    "adapter": Subject(
        make_adapter, adapter, ("adapter/*.json", "adapter/*.safetensors"), may_be_lost=("fedlora.json",)
    ),
    "stranger's adapter": Subject(of_a_stranger, strangers, ("adapter/*.json", "adapter/*.safetensors")),
}  # fmt: skip
