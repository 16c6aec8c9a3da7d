"""Reaching a peer: identity, transport, wire messages and tensor bytes. Knows nothing of models."""
