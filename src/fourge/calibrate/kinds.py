"""How much is kept of the second moments of inputs (moments.py), and of their tokens. Imports no
torch, so that memory can be planned with the same numbers.
"""

from enum import StrEnum

from fourge.formats.layout import BLOCK_SIZE

# One token in so many is held out, and at most so many are kept for one expert.
HOLD_OUT = 8
MOST_HELD = 256
# Of an expert's first so many tokens all count for its moments, of the next twice as many every
# second one, twice, of the next four times as many every fourth, and so on: what more tokens tell
# becomes less, and what they take does not.
ALL_COUNT = 1 << 15
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
