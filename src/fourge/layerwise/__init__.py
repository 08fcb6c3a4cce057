"""All tokens through a model that does not fit, layer by layer: groups, files, memory, resuming."""
