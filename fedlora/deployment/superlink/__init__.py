"""Parts beside the SuperLink: the proxy of the fleet API, the list of node keys, the polling Grid."""
