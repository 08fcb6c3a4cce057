"""What nvidia-modelopt's own weight algorithms make of a model, as checkpoints to evaluate.

    PYTHON scripts/modelopt_methods.py SOURCE OUT --data INPUT_IDS.jsonl
        [--algorithms max,mse,local_hessian] [--device cpu|cuda] [--dtype bfloat16|float32]

PYTHON is an interpreter with nvidia-modelopt==0.47.0, transformers, accelerate and requests; it
needs nothing of fourge. INPUT_IDS.jsonl has a line {"input_ids": [...]} for each sequence. Writes
OUT/modelopt-ALGORITHM as ModelOpt exports it: routed experts in NVFP4, the rest BF16, no tokenizer
and no MTP layer; `fourge evaluate` reads it. Prints a JSON line for each, after what ModelOpt says.

The configuration is ModelOpt's NVFP4_EXPERTS_ONLY_CFG; for mse and local_hessian with static weight
scales and the sweep over all FP8 scales, as in its recipe nvfp4_experts_only_mse and its preset
NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG. One sequence a forward, so that nothing is padded.

With --device cuda ModelOpt runs as it is. On a CPU it refuses both: it has its sweeps in PyTorch
too, but not the two roundings to NVFP4 that they call, of weights by given block scales and of
activations. Here these are then done in PyTorch with the arithmetic of its Triton kernels, and with
its own cast to E2M1.

To compare with fourge on the tokens of a recipe, write them with fourge's Python (here: demo; their
corpus.record["sha256"] is data.sha256 in the fourge/run.json of what fourge makes),

    import json
    from itertools import accumulate, pairwise
    from pathlib import Path
    from fourge.calibrate.corpus import build_corpus
    from fourge.quantize.recipe import load_recipe
    recipe = load_recipe("demo")
    corpus = build_corpus(recipe.passes, checkpoint=Path("examples/tiny-glm"), vocab_size=2048,
                          max_bad_share=recipe.max_bad_share)
    with open("input_ids.jsonl", "w") as file:
        for start, end in pairwise(accumulate(corpus.lengths.tolist(), initial=0)):
            print(json.dumps({"input_ids": corpus.tokens[start:end].tolist()}), file=file)

then run this script and evaluate all checkpoints in one command, so that they are paired window by
window:

    E=examples/evaluation
    fourge compare examples/tiny-glm --recipe demo --out compared --holdout $E/coding.jsonl
    PYTHON scripts/modelopt_methods.py examples/tiny-glm compared --data input_ids.jsonl
    fourge evaluate compared/{max,mse,local-hessian,local-hessian+descent} compared/modelopt-* \\
        --reference examples/tiny-glm --data $E/coding.jsonl --data $E/broad.jsonl \\
        --data $E/deep.jsonl --tokens 32768 --context 256 --record compared/with-modelopt
"""

import argparse
import copy
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from modelopt.torch import quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.nn.modules import tensor_quantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from transformers import AutoModelForCausalLM

ALGORITHMS: dict[str, Any] = {
    "max": "max",
    "mse": {"method": "mse", "fp8_scale_sweep": True},
    "local_hessian": {"method": "local_hessian", "fp8_scale_sweep": True},
}
PACKAGES = ("nvidia-modelopt", "torch", "transformers")
BLOCK = 16
E2M1_MOST, E4M3_MOST = 6.0, 448.0
LEAST_SCALE = 1e-5  # below it ModelOpt's kernel for activations divides by 1 instead


def main() -> None:
    options = parse_arguments()
    sequences = read_sequences(options.data)
    if options.device == "cpu":
        # Its many small operations take 10 to 50 times as long on threads of cores that are busy.
        torch.set_num_threads(1)
        round_on_the_cpu()
    for algorithm in options.algorithms:
        out = options.out / f"modelopt-{algorithm}"
        if out.exists():
            sys.exit(f"{out} exists: choose another OUT, or remove it.")
        seconds = quantize(options, algorithm, sequences, out)
        facts = {
            "checkpoint": str(out),
            "algorithm": algorithm,
            "sequences": len(sequences),
            "tokens": sum(map(len, sequences)),
            "device": options.device,
            "dtype": options.dtype,
            "calibrate_s": round(seconds, 1),
            "versions": {package: version(package) for package in PACKAGES},
        }
        print(json.dumps(facts), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Checkpoints by nvidia-modelopt's algorithms.")
    parser.add_argument("source", type=Path, help="folder of the BF16 checkpoint")
    parser.add_argument("out", type=Path, help="folder for the checkpoints")
    parser.add_argument("--data", type=Path, required=True, help='JSON lines {"input_ids": [...]}')
    parser.add_argument(
        "--algorithms",
        type=algorithm_names,
        default=list(ALGORITHMS),
        help=f"with commas between; of {', '.join(ALGORITHMS)} (default: all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args()


def algorithm_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ALGORITHMS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ALGORITHMS)}")
    return names


def read_sequences(path: Path) -> list[list[int]]:
    sequences = [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]
    if not sequences:
        sys.exit(f"{path} has no sequences: give at least one.")
    return sequences


def quantize(
    options: argparse.Namespace, algorithm: str, sequences: list[list[int]], out: Path
) -> float:
    """Load, calibrate, export to ``out``; return the seconds of the calibration."""
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=dtype)
    model = model.to(options.device).eval()

    def calibrate(model: torch.nn.Module) -> None:
        for sequence in sequences:
            model(torch.tensor([sequence], device=options.device), use_cache=False)

    with torch.no_grad():
        started = time.perf_counter()
        model = mtq.quantize(model, configuration(algorithm), calibrate)
        seconds = time.perf_counter() - started
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)
    return seconds


def configuration(algorithm: str) -> dict[str, Any]:
    """The experts-only configuration; a search for block scales needs static ones."""
    config = copy.deepcopy(mtq.NVFP4_EXPERTS_ONLY_CFG)
    config["algorithm"] = ALGORITHMS[algorithm]
    if algorithm != "max":
        for entry in config["quant_cfg"]:
            if entry["quantizer_name"].endswith("weight_quantizer") and "cfg" in entry:
                entry["cfg"]["block_sizes"]["type"] = "static"
    return config


# ---- on a CPU: what ModelOpt has for CUDA alone


def round_on_the_cpu() -> None:
    """Put the two functions below in the place of those that need Triton and CUDA."""
    tensor_quantizer.static_blockwise_fp4_fake_quant = round_weights
    tensor_quant.dynamic_block_quantize_op = round_activations


def round_weights(
    blocks: torch.Tensor, amax: torch.Tensor, global_amax: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """Weights [N, 16] rounded by block amax [N], as its kernel static_blockwise_fp4_fake_quant."""
    quantize_scales, most_scale, dtype, _ = rest
    assert quantize_scales
    assert most_scale == E4M3_MOST
    assert amax.numel() == len(blocks)
    scale = amax.float() / E2M1_MOST
    scale = tensor_quant.scaled_e4m3_impl(scale, global_amax.float() / E2M1_MOST)
    return round_by(blocks.float(), scale.reshape(-1, 1)).to(dtype)


def round_activations(
    inputs: torch.Tensor, block: int, amax: torch.Tensor, *bits: int
) -> torch.Tensor:
    """Inputs [..., K] rounded to NVFP4, as its kernel fp4_fake_quant_block."""
    assert block == BLOCK
    assert bits == (4, 2, 8, 4)  # E2M1 by E4M3: widths and bits of their exponents
    assert amax.numel() == 1
    blocks = inputs.float().reshape(-1, BLOCK)
    global_scale = amax.float().reshape(()) / (E2M1_MOST * E4M3_MOST)
    scale = blocks.abs().amax(1, keepdim=True) / (E2M1_MOST * global_scale)
    scale = scale.clamp(max=E4M3_MOST).to(torch.float8_e4m3fn).float() * global_scale
    scale = torch.where(scale >= LEAST_SCALE, scale, 1.0)
    return round_by(blocks, scale).reshape(inputs.shape).to(inputs.dtype)


def round_by(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of ``scale`` [N, 1] by an E2M1 value; zeros where it is 0."""
    safe = torch.where(scale == 0, 1.0, scale)
    codes = NVFP4QTensor._cast_fp4(blocks / safe)
    values = NVFP4QTensor.get_e2m1_values(blocks.device)[codes.long()]
    return values * scale


if __name__ == "__main__":
    main()
