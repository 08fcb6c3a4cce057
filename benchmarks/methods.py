"""What every quantization method takes, against max in the same run.

    .venv/bin/python benchmarks/methods.py [--hidden 1024 --inner 512] [--rounds 3] [--device cpu]
    .venv/bin/python benchmarks/methods.py --whole [--rounds 3]

For one expert: random weights, moments of inputs whose columns depend on each other; one thread on
the CPU, as quantizing runs one expert a thread. On a GPU give the shapes of GLM-5.1: --hidden 6144
--inner 2048. --whole: `fourge quantize` of the model of quantize_vs_modelopt.py, each method in
turn, each run a process of its own. Prints one JSON document: seconds of every round, their median,
and the time as a multiple of max's.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quantize_vs_modelopt import INPUT_IDS, MODEL, describe_run, run_child

from fourge.calibrate.moments import Measures, reduced
from fourge.quantize.methods import METHODS
from fourge.quantize.methods.expert import Expert
from fourge.quantize.recipe import NEEDS
from random_checkpoint import published_config, write_checkpoint, write_input_ids


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods for one expert, against max.")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    if options.whole:
        samples = whole_runs(options.rounds)
        report = {"benchmark": "methods, whole runs", **describe_run(), "device": "cpu"}
        print(json.dumps(report | {"methods": summarise(samples)}, indent=2))
        return
    torch.set_num_threads(1)
    device = torch.device(options.device)
    expert = make_expert(options.hidden, options.inner, device)
    full = Measures(*(moment_of(width, device) for width in (options.hidden, options.inner)))
    samples: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(options.rounds + 1):
        for method in METHODS:
            samples[method].append(seconds(method, expert, full))
    report = {
        "benchmark": "methods",
        **describe_run(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, one thread",
        "hidden": options.hidden,
        "inner": options.inner,
        "weights": 3 * options.hidden * options.inner,
        # The first round warms up.
        "methods": summarise({method: times[1:] for method, times in samples.items()}),
    }
    print(json.dumps(report, indent=2))


def summarise(samples: dict[str, list[float]]) -> dict[str, Any]:
    median = {method: statistics.median(times) for method, times in samples.items()}
    return {
        method: {
            "seconds": [round(one, 5) for one in times],
            "median_seconds": median[method],
            "times_max": median[method] / median["max"],
        }
        for method, times in samples.items()
    }


def whole_runs(rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_checkpoint(folder / "source", config=published_config(**MODEL))
        data = write_input_ids(folder / "ids.jsonl", **INPUT_IDS)
        for number in range(rounds):
            for method, times in samples.items():
                out = folder / f"{method}-{number}"
                command = ["quantize", source, out, "--data", data, "--method", method]
                found = run_child("fourge", sys.executable, [*map(str, command)], folder)
                times.append(found["total_s"])
                shutil.rmtree(out)
    return samples


def make_expert(hidden: int, inner: int, device: torch.device) -> Expert:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return Expert("", *((0.02 * torch.randn(one, device=device)).bfloat16() for one in shapes))


def moment_of(width: int, device: torch.device) -> torch.Tensor:
    """With blocks of condition 10 to 40, as those of the example model have."""
    x = torch.randn(4 * width, width, device=device)
    x = x + 0.5 * x.roll(1, 1) + 0.3 * torch.randn(len(x), 1, device=device)
    x = x * (0.5 + torch.rand(width, device=device))
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
