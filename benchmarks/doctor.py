"""Time and peak memory of `fourge doctor` on a random checkpoint of a few GB.

    .venv/bin/python benchmarks/doctor.py [--layers 10] [--hidden 2048] [--experts 64]

Quantizes a random model, then examines it: --sample (headers, scalars and one expert of each
layer), whole (every block scale), and against its source (every weight). Each once with the files
dropped from the page cache and once with them in it, in a process of its own. Prints one JSON
document with seconds, GB/s of the checkpoint, and the peak (VmHWM, imports included). The random
model's expert weights are most of it, as those of GLM-5.1 are.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantize_vs_modelopt import MODEL, describe_run, run_child


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        source, made = make_checkpoint(options, Path(folder))
        samples = measure(options, source, made)
        sizes = {"checkpoint_bytes": size_of([made]), "source_bytes": size_of([source])}
    print(
        json.dumps({"benchmark": "doctor", **describe_run(), **sizes, "samples": samples}, indent=2)
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and peak memory of `fourge doctor`.")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--memory", help="as for fourge doctor, e.g. 256MiB")
    parser.add_argument("--work", type=Path, help="where the temporary checkpoints go")
    return parser.parse_args()


def make_checkpoint(options: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    from random_checkpoint import published_config, write_checkpoint, write_input_ids

    shape = {
        "hidden_size": options.hidden,
        "moe_intermediate_size": options.hidden // 2,
        "intermediate_size": 2 * options.hidden,
        "n_routed_experts": options.experts,
        "num_hidden_layers": options.layers,
        "num_nextn_predict_layers": 0,
    }
    config = published_config(**{**MODEL, **shape})
    source, made = work / "source", work / "made"
    write_checkpoint(source, config=config, traps=False)
    ids = work / "input_ids.jsonl"
    data = write_input_ids(ids, sequences=8, length=128, vocab=config["vocab_size"])
    run_child(
        "fourge", sys.executable, ["quantize", str(source), str(made), "--data", str(data)], work
    )
    return source, made


def measure(options: argparse.Namespace, source: Path, made: Path) -> list[dict[str, Any]]:
    modes = {
        "sample": (["--sample"], [made]),
        "whole": ([], [made]),
        "against the source": (["--source", str(source)], [made, source]),
    }
    extra = ["--memory", options.memory] if options.memory else []
    samples = []
    for mode, (arguments, folders) in modes.items():
        for cached in (False, True):
            if not cached:
                drop_from_cache(folders)
            command = ["doctor", str(made), *arguments, *extra]
            sample = run_child("fourge", sys.executable, command, made.parent)
            rate = size_of([made]) / 1e9 / sample["total_s"]
            samples.append({"mode": mode, "cached": cached, "gb_per_s": rate, **sample})
    return samples


def size_of(folders: Iterable[Path]) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))


def drop_from_cache(folders: Iterable[Path]) -> None:
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
