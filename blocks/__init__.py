"""Running spans of a model: names, weights, KV memory and the engine. Knows nothing of peers."""
