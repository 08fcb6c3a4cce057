"""Makes the golden data in this folder: a tiny model with traps, quantized by NVIDIA ModelOpt.

    PYTHON_WITH_MODELOPT tests/golden/make_modelopt_checkpoint.py

needs nvidia-modelopt==0.47.0 with transformers, accelerate and requests; no GPU. Written beside
this script:

  modelopt-experts.safetensors       weight, weight_scale, weight_scale_2 and input_scale of every
                                     routed projection, as exported
  source.json                        the source's config, seed and hash, the calibration data, the
                                     versions, and the input scales with float32 activations
  modelopt-hf_quant_config.json      as exported
  modelopt-quantization_config.json  the block ModelOpt inserts into config.json

ModelOpt runs twice, in BF16 as its users do, and with float32 activations, as fourge computes on a
CPU. The weights' bytes must agree between the two, and the input scales within 1 %: with about half
of all seeds some token's routing hangs on BF16 rounding and down_proj's differ by 2 to 190 %.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from modelopt.torch import quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from random_checkpoint import (  # noqa: E402
    checkpoint_sha256,
    published_config,
    write_checkpoint,
    write_input_ids,
)

SEED = 13
CONFIG = published_config(hidden_size=96, moe_intermediate_size=48, n_routed_experts=8)
INPUT_IDS = {"sequences": 4, "length": 96, "vocab": CONFIG["vocab_size"], "seed": 1}
MOST_INPUT_SCALES_DIFFER = 0.01
PACKAGES = ("nvidia-modelopt", "torch", "transformers")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = write_checkpoint(work / "source", config=CONFIG, seed=SEED)
        data = write_input_ids(work / "input_ids.jsonl", **INPUT_IDS)
        experts = quantize(source, data, work / "bfloat16", torch.bfloat16)
        in_float32 = quantize(source, data, work / "float32", torch.float32)
        check_agreement(experts, in_float32)
        write_golden(experts, in_float32, work / "bfloat16")


def quantize(source: Path, data: Path, out: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Calibrate and export with the model held in `dtype`; return the routed experts' tensors."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    if dtype == torch.float32:
        use_config_eps(model)
    sequences = [json.loads(line)["input_ids"] for line in data.read_text().splitlines()]

    def calibrate(model: torch.nn.Module) -> None:
        for sequence in sequences:
            model(torch.tensor([sequence]), use_cache=False)

    with torch.no_grad():
        model = mtq.quantize(model, mtq.NVFP4_EXPERTS_ONLY_CFG, calibrate)
        export_hf_checkpoint(model, export_dir=out)
    return {
        name: tensor
        for name, tensor in load_file(out / "model.safetensors").items()
        if ".mlp.experts." in name
    }


def use_config_eps(model: torch.nn.Module) -> None:
    """Give q_a_layernorm and kv_a_layernorm the config's eps, as engines do, not 1e-6."""
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = CONFIG["rms_norm_eps"]


def check_agreement(experts: dict[str, torch.Tensor], in_float32: dict[str, torch.Tensor]) -> None:
    for name, tensor in experts.items():
        other = in_float32[name]
        if name.endswith("input_scale"):
            agree = abs(tensor.item() / other.item() - 1) < MOST_INPUT_SCALES_DIFFER
        else:
            agree = bytes_of(tensor) == bytes_of(other)
        if not agree:
            raise SystemExit(f"{name} depends on the dtype of the activations; try another seed")


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_golden(
    experts: dict[str, torch.Tensor], in_float32: dict[str, torch.Tensor], exported: Path
) -> None:
    versions = {package: version(package) for package in PACKAGES}
    source = {
        "config": CONFIG,
        "seed": SEED,
        "sha256": checkpoint_sha256(CONFIG, seed=SEED),
        "input_ids": INPUT_IDS,
        "versions": versions,
        "float32_input_scales": {
            name.removesuffix(".input_scale"): tensor.item()
            for name, tensor in sorted(in_float32.items())
            if name.endswith("input_scale")
        },
    }
    save_file(experts, HERE / "modelopt-experts.safetensors", metadata=versions)
    write_json("source.json", source)
    for_engines = json.loads((exported / "config.json").read_text())["quantization_config"]
    write_json("modelopt-quantization_config.json", for_engines)
    nested = json.loads((exported / "hf_quant_config.json").read_text())
    write_json("modelopt-hf_quant_config.json", nested)


def write_json(name: str, value: dict[str, Any]) -> None:
    (HERE / name).write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
