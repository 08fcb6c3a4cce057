"""Fast twins of this room's mathematics, each compared with its reference in the tests."""
