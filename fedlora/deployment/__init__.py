"""The same app on machines that hold their own data, as real Flower processes.

For the operator: `operator.create` writes a federation's directory (certificates, keys, start scripts),
`loopback` runs all of it on one machine, `operate` talks to the SuperLink, `submit` runs a configuration on
it, `layout` says which key is which partition. At the SuperLink: `superlink.proxy` lets nothing but
SuperNodes in, `polling_grid` asks for replies more often. At a node: `node.model_server` keeps the model
loaded between messages.

Importing this package imports nothing heavy: a ClientApp is a new process for every message.
"""
