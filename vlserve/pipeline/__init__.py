"""How Python asks a model: here, or over the network."""
