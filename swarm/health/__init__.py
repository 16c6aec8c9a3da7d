"""The health page: what a swarm looks like from outside, for people and for programs."""
