"""What every method takes and gives: the three projections of one routed expert."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fourge.formats.nvfp4 import NVFP4Tensor


class Expert(NamedTuple):
    """BF16 weights [out, in] of one expert, and the name prefix for messages."""

    prefix: str
    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor


# Yields (projection, NVFP4 tensor), one at a time, so that a caller need not hold all three.
Method = Callable[[Expert], Iterator[tuple[str, NVFP4Tensor]]]
