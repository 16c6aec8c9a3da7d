"""What is wrong with a connection to a swarm: looked at from many sides, and told with what to do."""
