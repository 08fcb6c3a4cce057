"""The mathematics of the models: config.json, a decoder layer's forward pass, shapes, bytes."""
