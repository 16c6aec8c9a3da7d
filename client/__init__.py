"""Using a swarm: the route, the session, generation, the library and the commands."""
