"""``max``: scales from the largest magnitude, bit-exact with nvidia-modelopt 0.47.

    scale = amax of the block / (6 weight_scale_2)

Depends on the weights alone.
"""

from fourge.calibrate.moments import Measures
from fourge.formats import kernels
from fourge.quantize.methods.expert import Expert, Quantized, tensor_scales


def quantize_expert(expert: Expert, _: Measures) -> Quantized:
    """CheckpointError if a weight is NaN or infinite."""
    return {
        name: kernels.quantize(getattr(expert, name), scale_2)
        for name, scale_2 in tensor_scales(expert).items()
    }
