#!/bin/sh
# Flower starts this in place of its own command of this name: the installed ClientApp, for the same code alone.
PYTHONSAFEPATH=1 exec python -m fedlora.pinned_client_app "$@@"
