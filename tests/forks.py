"""Servers that start in a moment, for end-to-end tests: forks of a process that their conftest.py runs."""

from benchmarks.servers import fork_server

FORKS = fork_server()
