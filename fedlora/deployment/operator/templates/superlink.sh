#!/bin/sh
# Starts the SuperLink of this federation; see docs/deployment.md. Flower and fedlora must be on PATH.
@{head}
export FEDLORA_FEDERATION="$here/federation.toml"
exec flower-superlink --host 127.0.0.1 --port "${FEDLORA_CONTROL_PORT:-@{control_port}}" \
    --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \
    --enable-supernode-auth --disable-runtime-dependency-installation --database superlink.db
