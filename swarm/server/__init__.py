"""Hosting: the shard cell, the sessions on this peer, and the server's life from start to leave."""
