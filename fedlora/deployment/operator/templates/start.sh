#!/bin/sh
# Starts this node; see docs/deployment.md. Flower and fedlora must be on PATH.
@{head}
export FEDLORA_STATE_DIR="$here/state"
# This node runs the fedlora that is installed here, and declines other code that a server ships (docs/security.md).
# Without this line it runs whatever the server ships.
export PATH="$here/bin:$PATH"
fedlora federation check "$here"
exec flower-supernode --superlink "${FEDLORA_SUPERLINK:-@{address}}" --root-certificates ca.crt \
    --auth-supernode-private-key key --node-config node.toml \
    --host 127.0.0.1 --port "${FEDLORA_NODE_PORT:-9094}"
