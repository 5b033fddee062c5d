"""A run, a study or a federation while it goes on: a page and Prometheus metrics on the loopback."""
