"""The same app on machines that hold their own data, as real Flower processes.

For the operator: `create` writes a federation's directory (certificates, keys, start scripts), `loopback`
runs all of it on one machine, `operate` talks to the SuperLink, `submit` runs a configuration on it. At the
SuperLink: `gate` lets nothing but SuperNodes in, `roll` says which key is which partition, `polling` asks for
replies more often. At a node: `node` is what its owner decides, `ask` and `serve` keep the model loaded
between messages, `handle` carries a message out.

Importing this package imports nothing heavy: a ClientApp is a new process for every message.
"""
