#!/bin/sh
# Starts this node; see docs/deployment.md. Flower and fedlora must be on PATH.
@{head}
export FEDLORA_STATE_DIR="$here/state"
fedlora federation check "$here"
exec flower-supernode --superlink "${FEDLORA_SUPERLINK:-@{address}}" --root-certificates ca.crt \
    --auth-supernode-private-key key --node-config node.toml \
    --host 127.0.0.1 --port "${FEDLORA_NODE_PORT:-9094}"
