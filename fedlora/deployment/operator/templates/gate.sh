#!/bin/sh
# Starts the gate in front of the SuperLink; see docs/deployment.md. Flower and fedlora must be on PATH.
@{head}
exec fedlora federation gate "$here" --host "${FEDLORA_GATE_HOST:-0.0.0.0}" \
    --port "${FEDLORA_GATE_PORT:-@{port}}" --control-port "${FEDLORA_CONTROL_PORT:-@{control_port}}"
