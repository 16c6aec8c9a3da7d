"""Servers that start in a moment, for end-to-end tests: forks of a process that their conftest.py runs."""

from swarm.forking import ForkServer

FORKS = ForkServer("swarm.server", "swarm.server.preload")
