"""What is wrong with a quantized checkpoint, seen from its files, and what can be put right."""
