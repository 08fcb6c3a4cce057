"""How fast a weight becomes NVFP4: the fast kernel, the readable reference, nvidia-modelopt.

    python benchmarks/packer.py [--device cuda] [--modelopt-python PATH]

Prints JSON: commit, machine, and per contender the seconds of every sample, in order. One CPU
thread. Each sample quantizes the next of several 2048 x 6144 weights, more than caches hold,
with outputs allocated before; for modelopt, which has no such argument, within the call. The
kernel's samples start after a call that compiles it (compile_s; the cache may have made it short).
The ratio compares medians. modelopt runs in its own process, after the others: in this Python,
or in PATH, where fourge itself is not needed.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPE = (2048, 6144)
NUM_WEIGHTS = SHAPE[0] * SHAPE[1]
NUM_TENSORS = 6
SAMPLES = {"kernel": 60, "amax": 60, "reference": 12, "modelopt": 6}

Json = dict[str, Any]


def make_weights(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(SHAPE, generator=generator) * 0.02).bfloat16().to(device)
        for _ in range(NUM_TENSORS)
    ]


def measure(name: str, work: Callable[[Tensor], object], weights: list[Tensor]) -> Json:
    """Seconds of each sample; on CUDA until the device is done."""
    synchronize = torch.cuda.synchronize if weights[0].is_cuda else lambda: None
    samples_s = []
    for i in range(SAMPLES[name]):
        synchronize()
        start = time.perf_counter()
        work(weights[i % len(weights)])
        synchronize()
        samples_s.append(time.perf_counter() - start)
    return {
        "mweights_per_s_median": round(NUM_WEIGHTS / statistics.median(samples_s) / 1e6, 1),
        "mweights_per_s_best": round(NUM_WEIGHTS / min(samples_s) / 1e6, 1),
        "samples_s": samples_s,
    }


def measure_fourge(weights: list[Tensor]) -> Json:
    from fourge.formats import kernels, nvfp4

    scale_2 = nvfp4.weight_scale_2(max(map(nvfp4.amax, weights))).to(weights[0].device)
    out = nvfp4.quantize(weights[0], scale_2)
    start = time.perf_counter()
    kernels.quantize(weights[0][:1], scale_2)
    compile_s = time.perf_counter() - start
    kernels.amax(weights[0][:1])
    kernel = measure("kernel", lambda w: kernels.quantize(w, scale_2, out), weights)
    return {
        "kernel": {"compile_s": compile_s, **kernel},
        "amax": measure("amax", kernels.amax, weights),
        "reference": measure("reference", lambda w: nvfp4.quantize(w, scale_2, out), weights),
    }


def measure_modelopt(weights: list[Tensor]) -> Json:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    def work(w: Tensor) -> None:
        scale = NVFP4QTensor.get_weights_scaling_factor(w, 16, scale_2)[0]
        NVFP4QTensor.quantize(w, 16, scale, scale_2)

    scale_2 = NVFP4QTensor.get_weights_scaling_factor_2(torch.stack(weights))
    work(weights[0][:1])
    return {"version": version("nvidia-modelopt"), **measure("modelopt", work, weights)}


def modelopt_in_own_process(python: str, device: str) -> Json:
    command = [python, __file__, "--device", device, "--only-modelopt"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def commit() -> str | None:
    """Commit of the source, "+" appended if files differ from it; None outside of a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    status = [*git, "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+" if changed else "")


def machine(device: str) -> Json:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numba")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Weights per second of the NVFP4 packers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--modelopt-python", metavar="PATH", help="a Python with nvidia-modelopt")
    parser.add_argument("--only-modelopt", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = make_weights(args.device)
    if args.only_modelopt:
        print(json.dumps(measure_modelopt(weights)))
        return
    report = {
        "commit": commit(),
        "command": [
            "PYTHON" if before == "--modelopt-python" else word
            for before, word in zip(["", *sys.argv], sys.argv, strict=False)
        ],
        "machine": machine(args.device),
        "torch_threads": torch.get_num_threads(),
        "shape": SHAPE,
        **measure_fourge(weights),
    }
    python = args.modelopt_python
    if python is None and importlib.util.find_spec("modelopt"):
        python = sys.executable
    if python is not None:
        report["modelopt"] = modelopt_in_own_process(python, args.device)
        medians = {k: report[k]["mweights_per_s_median"] for k in ("kernel", "modelopt")}
        report["kernel_over_modelopt"] = round(medians["kernel"] / medians["modelopt"], 1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
