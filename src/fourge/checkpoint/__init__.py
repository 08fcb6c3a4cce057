"""Bytes and names: what lies on disk, without knowing what it computes."""
