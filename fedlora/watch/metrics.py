"""Runs in Prometheus's text format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedlora.watch.snapshot import NodeState, RunState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("running", "silent", "finished", "failed")
Value = Callable[[RunState], float | None]
RUN: dict[str, tuple[str, str, Value]] = {
    "fedlora_run_round": ("gauge", "Last round that is done.", lambda run: run.round),
    "fedlora_run_rounds": ("gauge", "Rounds that were asked for.", lambda run: run.rounds),
    "fedlora_run_accuracy": ("gauge", "Share of test examples.", lambda run: run.last.get("accuracy")),
    "fedlora_run_loss": ("gauge", "Mean over test examples: nats, or squares.", lambda r: r.last.get("loss")),
    "fedlora_run_rmse": ("gauge", "Of regressions.", lambda run: run.last.get("rmse")),
    "fedlora_run_epsilon": ("gauge", "Of the client that spent most.", lambda run: run.last.get("epsilon")),
    "fedlora_run_target_epsilon": ("gauge", "The run's budget.", lambda run: run.target_epsilon),
    "fedlora_run_sent_bytes_total": ("counter", "By all clients.", lambda run: run.bytes_up),
    "fedlora_run_received_bytes_total": ("counter", "By all clients.", lambda run: run.bytes_down),
    "fedlora_run_refused_total": ("counter", "Updates that were refused.", lambda run: run.refused),
    "fedlora_run_seconds_total": ("counter", "Of all rounds.", lambda run: run.seconds),
    "fedlora_run_left_seconds": ("gauge", "Until the last round.", lambda run: run.seconds_left),
    "fedlora_run_changed_timestamp_seconds": ("gauge", "When a round was last written.", lambda r: r.changed),
}


def metrics(runs: Sequence[RunState], nodes: Sequence[NodeState]) -> str:
    """All series that have a value, each kind with its help and type."""
    lines: list[str] = []
    for name, (kind, meaning, value) in RUN.items():
        found = [({"run": run.name, "strategy": run.strategy}, value(run)) for run in runs]
        lines += _family(name, kind, meaning, found)
    states = [({"run": r.name, "state": s}, float(r.state == s)) for r in runs for s in STATES]
    lines += _family("fedlora_run_state", "gauge", "1 for the state that it is in.", states)
    declined = [({"node": node.name}, float(node.declined)) for node in nodes if node.seen]
    lines += _family("fedlora_node_declined_total", "counter", "Messages that it declined.", declined)
    return "\n".join([*lines, ""])


def _family(
    name: str, kind: str, meaning: str, values: Sequence[tuple[dict[str, str], float | None]]
) -> list[str]:
    series = [f"{name}{_labels(labels)} {value:.12g}" for labels, value in values if value is not None]
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *series] if series else []


def _labels(labels: dict[str, str]) -> str:
    r"""Labels, escaped.

    >>> print(_labels({"run": 'a"b\\'}))
    {run="a\"b\\"}
    """
    escaped = {
        key: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for key, text in labels.items()
    }
    return "{" + ",".join(f'{key}="{text}"' for key, text in escaped.items()) + "}"
