"""Parts beside the SuperLink: the proxy of the fleet API, the polling Grid."""
