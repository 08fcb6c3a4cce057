"""How long and how much memory: `fourge quantize` against nvidia-modelopt, on one random model.

    .venv/bin/python benchmarks/quantize_vs_modelopt.py --modelopt-python PYTHON [--repeat 3]

PYTHON is an interpreter with nvidia-modelopt==0.47.0, transformers, accelerate and requests. The
model: GLM-MoE-DSA, 6 layers (2 dense), hidden 512, 32 experts, 58.7M parameters, and an MTP layer;
calibrated on 16 x 128 random tokens. Each run is a process of its own; times are taken inside it
after the imports. ModelOpt's total is calibrate + export; its loading is reported apart and not
counted. fourge's total is the whole command, the kernels' compilation included when numba's cache
has none. Peak memory is VmHWM of the process, imports included. Prints one JSON document with every
sample, taken in turns, and the load average before each. On cores that others use too, ModelOpt's
many small operations on several threads take 10 to 50 times as long; --busy N shows that.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

MODEL = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 2,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "index_topk": 32,
    "index_n_heads": 8,
    "index_head_dim": 32,
    "vocab_size": 1024,
}
INPUT_IDS = {"sequences": 16, "length": 128, "vocab": 1024, "seed": 1}
MODELOPT_BATCH = 2  # sequences a forward; all have one length, so that nothing is padded
# What `fourge quantize` imports on its way; the timed part must import nothing heavy.
FOURGE_IMPORTS = ("torch", "numba", "fourge.formats.kernels", "fourge.quantize.run")
HEAVY = ("torch", "numba", "numpy", "transformers")


def main() -> None:
    options = parse_arguments()
    if options.child:
        measure = {"modelopt": measure_modelopt, "fourge": measure_fourge}[options.child]
        Path(options.result).write_text(json.dumps(measure(options.arguments)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        print(json.dumps(compare(options, Path(folder)), indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time and memory of `fourge quantize` against nvidia-modelopt."
    )
    parser.add_argument("--modelopt-python", help="an interpreter that has nvidia-modelopt")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--only", choices=("modelopt", "fourge"), help="run one of the two")
    parser.add_argument(
        "--busy", type=int, default=0, help="processes that keep a core each busy meanwhile"
    )
    parser.add_argument("--work", type=Path, help="where the temporary checkpoints go")
    parser.add_argument("--child", choices=("modelopt", "fourge"), help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.child or options.modelopt_python or options.only == "fourge"):
        parser.error("--modelopt-python is needed, or --only fourge")
    return options


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    from random_checkpoint import published_config, write_checkpoint, write_input_ids

    source = write_checkpoint(work / "source", config=published_config(**MODEL))
    data = write_input_ids(work / "input_ids.jsonl", **INPUT_IDS)
    interpreters = {"modelopt": options.modelopt_python, "fourge": sys.executable}
    samples: dict[str, list[dict[str, Any]]] = {
        side: [] for side in interpreters if options.only in (None, side)
    }
    with busy_processes(options.busy):
        for number in range(options.repeat):
            for side, runs in samples.items():
                arguments = command_of(side, source, work / f"{side}-{number}", data)
                runs.append(run_child(side, interpreters[side], arguments, work))
    report = {
        "benchmark": "quantize_vs_modelopt",
        **describe_run(),
        "busy_processes": options.busy,
        "parameters": count_parameters(),
        "input_ids": INPUT_IDS,
        "samples": samples,
        "median": {side: summarise(runs, statistics.median) for side, runs in samples.items()},
        "best": {side: summarise(runs, min) for side, runs in samples.items()},
    }
    if options.only is None:
        report["modelopt_over_fourge"] = {
            kind: report[kind]["modelopt"]["total_s"] / report[kind]["fourge"]["total_s"]
            for kind in ("median", "best")
        }
    return report


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """A machine that others use too."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def command_of(side: str, source: Path, out: Path, data: Path) -> list[str]:
    if side == "modelopt":
        return [str(source), str(out), str(data)]
    return ["quantize", str(source), str(out), "--method", "max", "--data", str(data)]


def summarise(
    samples: list[dict[str, Any]], of: Callable[[list[float]], float]
) -> dict[str, float]:
    keys = ("total_s", "peak_rss_bytes")
    return {key: of([sample[key] for sample in samples]) for key in keys}


def count_parameters() -> dict[str, int]:
    """Weights of the decoder and of the MTP layer, from the list of tensors."""
    from random_checkpoint import list_tensors, num_elements, published_config

    mtp_prefix = f"model.layers.{MODEL['num_hidden_layers']}."
    counts = {"decoder": 0, "mtp": 0}
    for tensor in list_tensors(published_config(**MODEL), fused_experts=False):
        part = "mtp" if tensor.name.startswith(mtp_prefix) else "decoder"
        counts[part] += num_elements(tensor)
    return counts


def describe_run() -> dict[str, Any]:
    """Commit, command and machine: what a figure is worth nothing without."""
    return {
        "commit": git("rev-parse", "--verify", "--quiet", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "command": ["python", *without_interpreter(sys.argv)],
        "machine": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version(),
        },
    }


def without_interpreter(arguments: list[str]) -> list[str]:
    """The command as anyone would type it: where the other Python lies is nobody's business."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return ["PYTHON" if before == "--modelopt-python" else word for before, word in pairs]


def git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def run_child(side: str, python: str, arguments: list[str], work: Path) -> dict[str, Any]:
    """Run one measurement in a fresh process; return what it measured."""
    result = work / "result.json"
    command = [python, __file__, "--child", side, "--result", str(result), "--", *arguments]
    load, started = os.getloadavg()[0], time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    process_s = time.perf_counter() - started
    return {**json.loads(result.read_text()), "process_s": process_s, "load_average": load}


def memory_bytes(key: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}; this benchmark needs Linux")


def measure_fourge(arguments: list[str]) -> dict[str, Any]:
    """Run the command line in this process; time it from after the imports to its end."""
    # As the command line does before it imports torch, see fourge/cli/main.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for module in FOURGE_IMPORTS:
        importlib.import_module(module)
    main = importlib.import_module("fourge.cli.main").main
    imported, rss_after_imports = set(sys.modules), memory_bytes("VmRSS")
    sys.argv = ["fourge", *arguments]
    started = time.perf_counter()
    try:
        status = main()
    except SystemExit as exit_:
        status = exit_.code
    total_s = time.perf_counter() - started
    if status:
        raise SystemExit(f"fourge {' '.join(arguments)} ended with status {status}")
    late = sorted({name for name in HEAVY if name in set(sys.modules) - imported})
    return {
        "total_s": total_s,
        "peak_rss_bytes": memory_bytes("VmHWM"),
        "rss_after_imports_bytes": rss_after_imports,
        "imported_while_timed": late,
        "versions": {"torch": version("torch"), "fourge": version("fourge")},
    }


def measure_modelopt(arguments: list[str]) -> dict[str, Any]:
    """Load, calibrate and export in this process, timed apart."""
    import torch
    from modelopt.torch import quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    source, out, data = arguments
    rss_after_imports, clock = memory_bytes("VmRSS"), time.perf_counter
    sequences = [json.loads(line)["input_ids"] for line in Path(data).read_text().splitlines()]

    def calibrate(model: torch.nn.Module) -> None:
        for start in range(0, len(sequences), MODELOPT_BATCH):
            batch = sequences[start : start + MODELOPT_BATCH]
            model(torch.tensor(batch), use_cache=False)

    started = clock()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    loaded, rss_after_load = clock(), memory_bytes("VmRSS")
    with torch.no_grad():
        model = mtq.quantize(model, mtq.NVFP4_EXPERTS_ONLY_CFG, calibrate)
        calibrated = clock()
        export_hf_checkpoint(model, export_dir=out)
    exported = clock()
    return {
        "total_s": exported - loaded,
        "load_s": loaded - started,
        "calibrate_s": calibrated - loaded,
        "export_s": exported - calibrated,
        "peak_rss_bytes": memory_bytes("VmHWM"),
        "rss_after_imports_bytes": rss_after_imports,
        "rss_after_load_bytes": rss_after_load,
        "versions": {name: version(name) for name in ("torch", "transformers", "nvidia-modelopt")},
    }


if __name__ == "__main__":
    main()
