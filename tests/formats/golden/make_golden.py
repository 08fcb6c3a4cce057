"""Write the golden bytes of tests/formats: what nvidia-modelopt makes of small tensors.

Run by hand, with a Python that has nvidia-modelopt and safetensors (fourge itself is not needed):

    python tests/formats/golden/make_golden.py

One file per case: w (bfloat16 [N, K]), weight, weight_scale, weight_scale_2, and as JSON in the
metadata the versions and the amax that weight_scale_2 was made from. input_scale.safetensors holds
amax and scale. Two runs with the same versions write the same bytes.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
VERSIONS = {name: version(name) for name in ("nvidia-modelopt", "torch")}
THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def normal(n: int, k: int, *, std: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * std


def zero_blocks() -> Tensor:
    w = normal(16, 128, seed=1)
    w[:, 16:48] = 0
    w[3] = 0
    w[5, 64:80] = -0.0
    return w


def one_huge_outlier() -> Tensor:
    w = normal(16, 128, seed=2)
    w[7, 33] = -3000.0
    return w


def tiny_rows() -> Tensor:
    w = normal(16, 128, seed=3)
    w[1] *= 1e-6 / 0.02
    w[2] *= 1e-38 / 0.02
    w[3] *= 1e-40 / 0.02
    return w


def element_ties() -> Tensor:
    """scale_2 is 1 and every block but the first has scale 1: the division changes nothing."""
    w = torch.zeros(8, 64)
    w[:, ::16] = 6.0
    w[0, 0] = 2688.0
    ties = torch.tensor(THRESHOLDS)
    below, above = (
        (ties.bfloat16().view(torch.int16) + step).view(torch.bfloat16).float() for step in (-1, 1)
    )
    for column, values in ((17, ties), (33, below), (49, above)):
        w[0, column : column + 7] = values
        w[1, column : column + 7] = -values
    w[0, 24], w[1, 24] = -0.0, -0.125
    return w


def block_scale_ties() -> Tensor:
    """scale_2 is 1; block maxima are 6 times a midpoint between neighbouring E4M3 numbers."""
    normals = [6 * 2.0**e * (1 + m / 16) for e in (-6, -3, 0, 4) for m in range(1, 16, 2)]
    subnormals = [6 * 2.0**-9 * (m + 0.5) for m in range(8)]
    maxima = torch.tensor([2688.0, 6 * 432.0, *normals, *subnormals])
    w = normal(maxima.numel(), 16, std=0.3, seed=4).clamp(-1, 1) * maxima[:, None]
    w[:, 5] = maxima
    return w


def scales_at_both_clamps() -> Tensor:
    w = normal(16, 128, seed=5)
    w[2] *= 1e-4
    w[3] *= 1e-5
    w[4] *= 1e-6
    return w


def wide_range() -> Tensor:
    """Rows from 2^-130 to 2^127: some ratios to the maximum are subnormal, some underflow to 0."""
    w = normal(258, 32, std=0.3, seed=6).clamp(-1, 1)
    return w * torch.exp2(torch.arange(-130, 128).double())[:, None]


def mixed_blocks() -> Tensor:
    exponents = torch.randint(-20, 4, (24, 16), generator=torch.Generator().manual_seed(7))
    return normal(24, 256, seed=8) * torch.exp2(exponents.float()).repeat_interleave(16, dim=1)


CASES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(64, 256),
    "odd_rows": lambda: normal(7, 48, seed=9),
    "one_block": lambda: normal(1, 16, seed=10),
    "zero_blocks": zero_blocks,
    "one_huge_outlier": one_huge_outlier,
    "tiny_rows": tiny_rows,
    "element_ties": element_ties,
    "block_scale_ties": block_scale_ties,
    "wide_range": wide_range,
    "mixed_blocks": mixed_blocks,
    "all_tiny": lambda: normal(8, 64, std=1e-38, seed=11),
    "all_subnormal": lambda: normal(8, 64, std=1e-39, seed=12),
}


def write_case(name: str, w: Tensor, amax_of: Tensor | None = None) -> None:
    """Quantize w with the scale_2 of amax_of (default: of w itself) and write the file."""
    w = w.bfloat16()
    source = w if amax_of is None else amax_of.bfloat16()
    scale_2 = NVFP4QTensor.get_weights_scaling_factor_2(source)
    scale = NVFP4QTensor.get_weights_scaling_factor(w, 16, scale_2)[0]
    quantized = NVFP4QTensor.quantize(w, 16, scale, scale_2)[0]._quantized_data
    write(
        name,
        {"w": w, "weight": quantized, "weight_scale": scale, "weight_scale_2": scale_2},
        {"amax": source.abs().max().item()},
    )


def write_input_scales() -> None:
    amaxes = torch.tensor([1.0, 0.37, 3e-5, 1000.0, 2688.0, 1e-38, 0.0, torch.nan])
    scales = []
    for amax in amaxes:
        quantizer = TensorQuantizer(
            QuantizerAttributeConfig(
                num_bits=(2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
            )
        )
        quantizer.amax = amax
        scales.append(NVFP4QTensor.get_activation_scaling_factor(quantizer).float().reshape(()))
    write("input_scale", {"amax": amaxes, "scale": torch.stack(scales)}, {})


def write(name: str, tensors: dict[str, Tensor], facts: dict[str, float]) -> None:
    """One metadata key only: safetensors writes several in a random order."""
    made_with = json.dumps({**VERSIONS, **facts})
    save_file(tensors, FOLDER / f"{name}.safetensors", {"made_with": made_with})


def main() -> None:
    for name, make in CASES.items():
        write_case(name, make())
    gate, up = normal(16, 128, seed=13), normal(16, 128, std=0.05, seed=14)
    for name, w in (("pair_gate", gate), ("pair_up", up)):
        write_case(name, w, amax_of=torch.cat((gate, up)))
    w = scales_at_both_clamps()
    write_case("scales_at_both_clamps", w, amax_of=w / 3)
    write_input_scales()


if __name__ == "__main__":
    main()
