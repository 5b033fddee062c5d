"""``flwr-clientapp`` of a node that runs its own fedlora: of what the server ships nothing is carried out.

Flower sends the app's code with a run, unpacks it and imports its ClientApp. A node's start script puts a
command before Flower's that ends up here: the shipped Python files are compared with the installed ones in
memory, letter for letter, and the installed ClientApp is taken where they are the same. Else the node
declines; its own log says what differs. Nothing is unpacked.
"""
