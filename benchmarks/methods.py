"""What every quantization method takes for one expert, against max in the same run.

    .venv/bin/python benchmarks/methods.py [--hidden 1024 --inner 512] [--rounds 3] [--device cpu]

Random weights and moments; one thread on the CPU, as quantizing runs one expert a thread. On a GPU
give the shapes of GLM-5.1: --hidden 6144 --inner 2048. Prints one JSON document: seconds of every
round, their median, millions of weights a second, and the time as a multiple of max's.
"""

import argparse
import json
import statistics
import time

import torch
from quantize_vs_modelopt import describe_run

from fourge.calibrate.moments import Measures, reduced
from fourge.quantize.methods import METHODS
from fourge.quantize.methods.expert import Expert
from fourge.quantize.recipe import NEEDS


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods for one expert, against max.")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    expert = make_expert(options.hidden, options.inner, device)
    full = Measures(*(moment_of(width, device) for width in (options.hidden, options.inner)))
    samples: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(options.rounds + 1):
        for method in METHODS:
            samples[method].append(seconds(method, expert, full))
    weights = 3 * options.hidden * options.inner
    median = {method: statistics.median(times[1:]) for method, times in samples.items()}
    report = {
        "benchmark": "methods",
        **describe_run(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, one thread",
        "hidden": options.hidden,
        "inner": options.inner,
        "methods": {
            method: {
                "seconds": [round(one, 5) for one in times[1:]],  # the first one warms up
                "median_seconds": median[method],
                "million_weights_per_s": weights / median[method] / 1e6,
                "times_max": median[method] / median["max"],
            }
            for method, times in samples.items()
        },
    }
    print(json.dumps(report, indent=2))


def make_expert(hidden: int, inner: int, device: torch.device) -> Expert:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return Expert("", *((0.02 * torch.randn(one, device=device)).bfloat16() for one in shapes))


def moment_of(width: int, device: torch.device) -> torch.Tensor:
    x = torch.randn(2 * width, width, device=device) * torch.rand(width, device=device)
    x[:, 1:] += x[:, :-1]
    return x.T @ x / len(x)


def seconds(method: str, expert: Expert, full: Measures) -> float:
    measures = Measures(*(reduced(one.clone(), NEEDS[method]) for one in full))
    if full.down.device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    METHODS[method].quantize(expert, measures)
    if full.down.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
