"""fourge makes, proves and serves NVFP4 checkpoints of very large Mixture-of-Experts models."""

__version__ = "0.1.0"
