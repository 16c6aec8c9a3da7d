"""Imports all that a server imports late: for a process that is to be forked into servers."""

import swarm.blocks.engine
import swarm.dht.kademlia
import swarm.net.libp2p
import swarm.server.startup
import swarm.server.stopping  # noqa: F401
