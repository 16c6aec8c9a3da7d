"""Where a peer stands in the DHT: the id of its node follows from the peer's own, so that nobody chooses it.

Also keeps what peers say of nodes to that rule. Knows hivemind's messages by the names of their fields alone.
"""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from typing import Any

from swarm.net.identity import is_binary_peer_id

NODE_ID_BYTES = 20
MAX_NAMED = 20
"""Nodes that one answer may name for a key: as many as a bucket holds."""

_DOMAIN = b"swarm-node-v1"


@lru_cache(maxsize=8192)
def node_id_of(peer: bytes) -> bytes:
    """The id of a peer's node, `peer` being its id in binary form."""
    return sha256(_DOMAIN + peer).digest()[:NODE_ID_BYTES]


def keep_to_ids(message: Any, sender: bytes) -> None:
    """Take out of a message of the DHT what it says of nodes that cannot be.

    A `sender` that says another id than its own says none then, as a client does. Of the nodes that an answer
    names, at most `MAX_NAMED` a key stay, and those alone whose ids are those of their peers.
    """
    if message.peer.node_id and message.peer.node_id != node_id_of(sender):
        message.peer.ClearField("node_id")
    for result in getattr(message, "results", ()):
        named = list(islice(_true_names(result), MAX_NAMED))
        if len(named) < max(len(result.nearest_node_ids), len(result.nearest_peer_ids)):
            result.ClearField("nearest_node_ids")
            result.ClearField("nearest_peer_ids")
            result.nearest_node_ids.extend(node_id for node_id, _ in named)
            result.nearest_peer_ids.extend(peer for _, peer in named)


def _true_names(result: Any) -> Iterator[tuple[bytes, bytes]]:
    named = zip(result.nearest_node_ids, result.nearest_peer_ids, strict=False)
    for node_id, peer in islice(named, 2 * MAX_NAMED):
        if is_binary_peer_id(peer) and node_id == node_id_of(peer):
            yield node_id, peer
