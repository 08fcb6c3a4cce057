"""How fast a checkpoint comes onto a GPU, against reading its files.

    python benchmarks/loading.py [--layers 6] [--rounds 3] [--folder FOLDER] [--out FILE]

Writes GLM-5.1 with fewer layers (one dense, the others of 256 NVFP4 experts, 5.4 GB each; random
bytes that are finite numbers of every dtype) and takes turns: "read" reads all files with as many
threads as the loader has, in pieces of 16 MiB, into memory that is used again; "load" is
engine/loader.py, which checks and places every tensor. "cold": the system was told before to drop
the files from its cache. Writes one JSON document: bytes, and bytes per second of every round.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from packer import commit, machine

from fourge.engine.loader import Loader
from fourge.layerwise.budget import default_workers
from fourge.models.survey import survey_quantized

PIECE = 16 << 20
FINITE = 0x3F  # with these bits alone, no byte makes BF16, E4M3 or float32 infinite or NaN


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading against reading.")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written; else /tmp")
    parser.add_argument("--out", type=Path, help="file of the JSON document; else stdout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoint = Path(folder) / "checkpoint"
        write(checkpoint, options.layers)
        files = sorted(checkpoint.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        ways = {"read": lambda: read(files), "load": lambda: load(checkpoint)}
        load(checkpoint)  # starts CUDA
        rates = {
            state: {
                name: measure(way, files, size, rounds=options.rounds, cold=state == "cold")
                for name, way in ways.items()
            }
            for state in ("cold", "warm")
        }
    report = {
        "benchmark": "loading",
        "commit": commit(),
        "command": ["benchmarks/loading.py", *sys.argv[1:]],
        "machine": machine("cuda"),
        "threads": default_workers(),
        "bytes": size,
        "bytes_per_s": rates,
        "load_over_read": {
            state: statistics.median(own["load"]) / statistics.median(own["read"])
            for state, own in rates.items()
        },
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


def write(folder: Path, layers: int) -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from hollow_checkpoint import glm_5_1, write_hollow_nvfp4

    write_hollow_nvfp4(folder, glm_5_1(layers), tensors_per_shard=1000)
    piece = bytes(byte & FINITE for byte in os.urandom(PIECE))
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(start)
            left = path.stat().st_size - start
            while left:
                left -= stream.write(piece[:left])


def read(files: Iterable[Path]) -> None:
    def one(path: Path) -> None:
        buffer = bytearray(PIECE)
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(one, files))


def load(checkpoint: Path) -> None:
    source = survey_quantized(checkpoint)
    layers = range(source.config.num_hidden_layers)
    loader = Loader(
        source, layers, device=torch.device("cuda"), dtype=torch.bfloat16,
        on_progress=lambda done, total: None,
    )  # fmt: skip
    loader.load(0)
    torch.cuda.synchronize()


def measure(
    way: Callable[[], None], files: Iterable[Path], size: int, *, rounds: int, cold: bool
) -> list[float]:
    rates = []
    for _ in range(rounds):
        if cold:
            drop(files)
        begun = time.perf_counter()
        way()
        rates.append(size / (time.perf_counter() - begun))
    return rates


def drop(files: Iterable[Path]) -> None:
    """Out of the system's cache; dirty pages would stay, so they are written first."""
    for path in files:
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
