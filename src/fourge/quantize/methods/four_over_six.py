"""``four-over-six``: of every block, 6 or 4 becomes the code of its largest weight (Cook et al.,
arXiv 2512.02010).

    s6 = amax of the block / (6 weight_scale_2), s4 = 1.5 s6; the one with the less squared error

With 4 the upper half of a block lies in steps of 0.5 and 1 rather than 2. weight_scale_2 is
amax / (6 * 256), so that 1.5 times the largest scale, 384, is an E4M3 number. Depends on the
weights alone. As nvidia-modelopt 0.47 (four_over_six) and mit-han-lab/fouroversix do it.
"""

import torch

from fourge.calibrate.moments import Measures
from fourge.formats import e2m1, fp8, kernels
from fourge.formats.layout import BLOCK_SIZE
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.models import chunks
from fourge.quantize.methods.expert import ROOMY_RANGE, Expert, Quantized, tensor_scales


def quantize_expert(expert: Expert, _: Measures) -> Quantized:
    """CheckpointError if a weight is NaN or infinite."""
    return {
        name: _quantize(getattr(expert, name).float(), scale_2)
        for name, scale_2 in tensor_scales(expert, ROOMY_RANGE).items()
    }


def _quantize(x_NK: torch.Tensor, scale_2: torch.Tensor) -> NVFP4Tensor:
    scale_2 = scale_2.to(x_NK.device)
    scales = [_better(x_NK[rows], scale_2) for rows in chunks.slices(len(x_NK), chunks.ROWS)]
    return kernels.round_to(x_NK, torch.cat(scales), scale_2)


def _better(x_NK: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    x_NBS = x_NK.unflatten(-1, (-1, BLOCK_SIZE))
    ratio_NB = x_NBS.abs().amax(-1) / (e2m1.MAX * scale_2)
    ratio_NB = torch.where(ratio_NB == 0, 1.0, ratio_NB)
    six, four = (
        fp8.to_e4m3((factor * ratio_NB).clamp(fp8.SMALLEST, fp8.MAX)) for factor in (1.0, 1.5)
    )
    errors = [_squared_error(x_NBS, scale, scale_2) for scale in (six, four)]
    return torch.where(errors[1] < errors[0], four.float(), six.float()).to(torch.float8_e4m3fn)


def _squared_error(
    x_NBS: torch.Tensor, scale_NB: torch.Tensor, scale_2: torch.Tensor
) -> torch.Tensor:
    divisor_NB1 = (fp8.from_e4m3(scale_NB) * scale_2).unsqueeze(-1)
    return (e2m1.decode(e2m1.encode(x_NBS / divisor_NB1)) * divisor_NB1 - x_NBS).square().sum(-1)
