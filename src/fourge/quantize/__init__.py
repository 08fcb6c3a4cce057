"""From a recipe and a checkpoint to a quantized checkpoint."""
