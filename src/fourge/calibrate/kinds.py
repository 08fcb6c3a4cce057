"""How much is kept of the second moments of inputs (moments.py), and of their tokens. Imports no
torch, so that memory can be planned with the same numbers.
"""

from enum import StrEnum

from fourge.formats.layout import BLOCK_SIZE

# One token in so many is held out, and at most so many are kept for one expert.
HOLD_OUT = 8
MOST_HELD = 256
# Tokens of a layer that are kept to stand for all of it.
LAYER_SAMPLE = 512


class Kind(StrEnum):
    """Each is part of the next."""

    NONE = "none"
    DIAGONAL = "diagonal"
    BLOCKS = "blocks"
    FULL = "full"


def moment_elements(kind: Kind, width: int) -> int:
    """Numbers that one moment of an input of ``width`` columns holds."""
    return {
        Kind.NONE: 0,
        Kind.DIAGONAL: width,
        Kind.BLOCKS: width * BLOCK_SIZE,
        Kind.FULL: width * width,
    }[kind]
