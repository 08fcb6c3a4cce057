"""Peak memory of `fourge quantize` against the number of layers, on random models of one shape.

    .venv/bin/python benchmarks/memory_over_layers.py [--layers 4 8 16] [--memory 2GiB]

Prints one JSON document: the peak (VmHWM of the process, imports included) for each number of
layers and the least-squares slope in bytes a layer, beside the bytes that a layer has in the
checkpoint. With --memory, every run gets that budget, and the document says whether each peak
stayed under it; a larger --hidden and --experts make checkpoints of several GB, for example
--layers 8 --hidden 2048 --experts 64 --memory 2GiB. One run after another, each in a process of its
own; only the checkpoint in use lies on the disk.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantize_vs_modelopt import MODEL, describe_run, run_child

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        samples = [measure(layers, options, Path(folder)) for layers in options.layers]
    report = {
        "benchmark": "memory_over_layers",
        **describe_run(),
        "memory": options.memory,
        "samples": samples,
    }
    if len(samples) > 1:
        peaks = [sample["peak_rss_bytes"] for sample in samples]
        report["slope_bytes_per_layer"] = least_squares_slope(options.layers, peaks)
        report["checkpoint_bytes_per_layer"] = least_squares_slope(
            options.layers, [sample["checkpoint_bytes"] for sample in samples]
        )
    print(json.dumps(report, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Peak memory of `fourge quantize` against the number of layers."
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--memory", help="the budget, as for fourge quantize, e.g. 2GiB")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--work", type=Path, help="where the temporary checkpoints go")
    return parser.parse_args()


def measure(num_layers: int, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    from random_checkpoint import published_config, write_checkpoint, write_input_ids

    shape = {
        "hidden_size": options.hidden,
        "moe_intermediate_size": options.hidden // 2,
        "intermediate_size": 2 * options.hidden,
        "n_routed_experts": options.experts,
    }
    config = published_config(**{**MODEL, **shape, "num_hidden_layers": num_layers})
    source, out = work / "source", work / "out"
    write_checkpoint(source, config=config)
    data = write_input_ids(
        work / "input_ids.jsonl",
        sequences=options.sequences,
        length=options.length,
        vocab=config["vocab_size"],
    )
    command = ["quantize", str(source), str(out), "--data", str(data)]
    if options.memory:
        command += ["--memory", options.memory]
    sample = run_child("fourge", sys.executable, command, work)
    checkpoint_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shutil.rmtree(source)
    shutil.rmtree(out)
    sample = {"layers": num_layers, "checkpoint_bytes": checkpoint_bytes, **sample}
    if options.memory:
        sample["under_budget"] = sample["peak_rss_bytes"] <= to_bytes(options.memory)
    return sample


def to_bytes(size: str) -> int:
    parts = re.fullmatch(r"([0-9.]+) *([A-Za-z]+)", size)
    if parts is None or parts[2] not in UNITS:
        raise SystemExit(f"--memory {size}: needed is a number and one of {', '.join(UNITS)}")
    return int(float(parts[1]) * UNITS[parts[2]])


def least_squares_slope(xs: list[int], ys: list[int]) -> float:
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


if __name__ == "__main__":
    main()
