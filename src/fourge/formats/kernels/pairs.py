"""How both kernels read weights: two neighbouring bfloat16 as one 32-bit word, little-endian.

A bfloat16 is the upper half of a float32. So, of a word, the low half shifted up by 16 bits is
the float32 value of the weight of even k, and the high half with the low one masked away that of
odd k; and their two codes make one packed byte. Nothing has to be shuffled.
"""

import torch
from torch import Tensor


def as_pairs(w: Tensor) -> Tensor:
    """int32 [N K/2] of bfloat16 [N, K], K even; a copy if w is strided or off a word border."""
    w = w.detach().reshape(-1)
    if w.data_ptr() % 4 or w.storage_offset() % 2:
        w = w.clone()
    return w.view(torch.int32)
