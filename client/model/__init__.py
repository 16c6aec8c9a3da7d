"""The swarm's model as a module of torch and transformers, with the names that users of Petals know.

Stands on the blocking library. Owns tensors, batches and what transformers asks of a model; must not know of
peers, routes or the wire.
"""
