"""How fast a GPU decodes with GLM-5.1's layers: kernels against memory bandwidth, whole steps.

    python benchmarks/engine_gpu.py [--layers 4] [--context 8192] [--out FILE]

Random weights of GLM-5.1's real shapes: layers (the first one dense, the others of 256 NVFP4
experts, 5.4 GB each), embedding and head. Needs 27 GB of device memory. Writes one JSON document:

copy       bytes per second of a large copy, read and written: the bandwidth that floors come from
experts    one layer's routed experts: packed, and BF16 through torch's grouped product
attention  2048 chosen rows a query, 64 heads, where they lie; BF16 and FP8 rows
steps      decode steps of the stack with head and argmax: tokens/s, with CUDA graphs and without
engines    the whole engine with the example model, its experts packed, greedy: tokens/s with steps
           launched ahead and not, with drafts, with graphs and without; ways take turns

A floor is the bytes that must be read once, over the bandwidth. Kernel times are of CUDA graphs of
several calls that read different experts or rows, so that caches do not help.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from packer import commit, machine

from fourge.checkpoint.names import FUSED_DOWN, FUSED_GATE_UP
from fourge.engine.cache import PagedCache
from fourge.engine.engine import Engine
from fourge.engine.loader import Loaded
from fourge.engine.params import SamplingParams
from fourge.engine.request import Chunk
from fourge.engine.runner import Runner
from fourge.formats.cache_rows import PAGE_TOKENS, latent_row_bytes
from fourge.formats.layout import packed_shape, scale_shape
from fourge.models.config import ModelConfig, from_dict
from fourge.models.kernels import gpu_attention
from fourge.models.moe import Routed, run_fused_experts
from fourge.models.tensors import layer_shapes, projection_shape

REPOSITORY = Path(__file__).resolve().parent.parent
BATCHES = (1, 8, 32)
CALLS = 8  # in a graph
TEXT = 64  # tokens after the first, of the whole engine's requests
FLOAT32 = ("self_attn.indexer.weights_proj.", "self_attn.indexer.k_norm.", "mlp.gate.")

Weights = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding with GLM-5.1's layers on one GPU.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="file of the JSON document; else stdout")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = glm(options.layers)
    with torch.inference_mode():
        copy = copy_bandwidth()
        layer = random_layer(config, 1)
        report = {
            "benchmark": "engine_gpu",
            "commit": commit(),
            "command": ["benchmarks/engine_gpu.py", *sys.argv[1:]],
            "machine": machine("cuda"),
            "copy_bytes_per_s": copy,
            "experts": [experts(config, layer, tokens, copy) for tokens in (*BATCHES, 2048)],
            "attention": [
                attention(config, tokens, kind, copy)
                for kind in ("bf16", "fp8")
                for tokens in BATCHES
            ],
        }
        add_grouped_product(config, report["experts"])
        report["steps"] = steps(config, layer, options.context)
    report["engines"] = [own for batch in BATCHES for own in engines(batch, "cuda")]
    report["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


def glm(num_layers: int) -> ModelConfig:
    """GLM-5.1 with fewer layers."""
    sys.path.append(str(REPOSITORY / "tests"))
    from hollow_checkpoint import glm_5_1

    return from_dict(glm_5_1(num_layers))


def random_layer(config: ModelConfig, layer: int) -> Weights:
    """As engine/loader.py lays a layer out on a GPU."""
    weights: Weights = {}
    for name, shape in layer_shapes(config, layer).items():
        if name.startswith("mlp.experts."):
            continue
        dtype = torch.float32 if name.startswith(FLOAT32) else torch.bfloat16
        weights[name] = torch.randn(shape, device="cuda", dtype=dtype).mul_(shape[-1] ** -0.5)
        if "norm" in name:
            weights[name].fill_(1)
    if config.is_sparse(layer):
        rows, columns = projection_shape(config, "gate_proj")
        for name, shape, scalars in (
            (FUSED_GATE_UP, (2 * rows, columns), (2,)),
            (FUSED_DOWN, (columns, rows), ()),
        ):
            weights |= random_stack(name, config.n_routed_experts, shape, scalars)
    return weights


def random_stack(
    name: str, count: int, shape: tuple[int, int], scalars: tuple[int, ...]
) -> Weights:
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.uint8}
    scale = torch.randint(96, 120, (count, *scale_shape(shape)), **kind)  # 16 to 120
    return {
        name: torch.randint(256, (count, *packed_shape(shape)), **kind),
        f"{name}_scale": scale.view(torch.float8_e4m3fn),
        f"{name}_scale_2": torch.full((count, *scalars), shape[1] ** -0.5 / 150, device="cuda"),
    }


def copy_bandwidth() -> float:
    source = torch.randint(256, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median(sampled(lambda: target.copy_(source)))


def sampled(work: Callable[[], object], rounds: int = 21) -> list[float]:
    """Seconds on the device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def per_call(work: Callable[[int], object]) -> list[float]:
    """Seconds of one of CALLS calls in a graph."""
    for call in range(CALLS):
        work(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            work(call)
    return [one / CALLS for one in sampled(graph.replay)]


def random_routed(config: ModelConfig, tokens: int) -> list[Routed]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    kind: dict[str, Any] = {"device": "cuda", "generator": generator}
    size, count = config.hidden_size, config.num_experts_per_tok
    return [
        Routed(
            torch.randn(tokens, size, **kind).bfloat16(),
            torch.rand(tokens, config.n_routed_experts, **kind).topk(count).indices,
            torch.rand(tokens, count, **kind),
            torch.zeros(tokens, size, device="cuda"),
        )
        for _ in range(CALLS)
    ]


def experts(config: ModelConfig, layer: Weights, tokens: int, copy: float) -> dict[str, Any]:
    routed = random_routed(config, tokens)
    samples = per_call(lambda call: run_fused_experts(routed[call], layer))
    active = statistics.mean(one.experts_TK.unique().numel() for one in routed)
    floor = active * 3 * config.hidden_size * config.moe_intermediate_size * 0.5625 / copy
    return {
        "tokens": tokens,
        "experts_read": active,
        "seconds": median(samples),
        "floor_s": floor,
        "of_floor": floor / median(samples),
        "samples_s": samples,
    }


def add_grouped_product(config: ModelConfig, reports: list[dict[str, Any]]) -> None:
    """Seconds of the same with BF16 weights."""
    rows, columns = projection_shape(config, "gate_proj")
    count, kind = config.n_routed_experts, {"device": "cuda", "dtype": torch.bfloat16}
    weights = {
        FUSED_GATE_UP: torch.randn(count, 2 * rows, columns, **kind).mul_(columns**-0.5),
        FUSED_DOWN: torch.randn(count, columns, rows, **kind).mul_(rows**-0.5),
    }
    for report in reports:
        routed = random_routed(config, report["tokens"])
        samples = per_call(lambda call, routed=routed: run_fused_experts(routed[call], weights))
        report |= {"bf16_seconds": median(samples), "bf16_samples_s": samples}
        report["bf16_over_packed"] = report["bf16_seconds"] / report["seconds"]


def attention(config: ModelConfig, tokens: int, kind: str, copy: float) -> dict[str, Any]:
    latent, rotated, chosen = config.kv_lora_rank, config.qk_rope_head_dim, config.index_topk
    num_slots = 1 << 19
    rows = torch.randn(num_slots, latent + rotated, device="cuda", dtype=torch.bfloat16)
    if kind == "fp8":
        row = latent_row_bytes(latent, rotated)
        rows = torch.randint(1, 60, (num_slots, row), device="cuda", dtype=torch.uint8)
    query = torch.randn(
        tokens, config.num_attention_heads, latent + rotated, device="cuda", dtype=torch.bfloat16
    )
    slots = torch.randint(num_slots, (CALLS, tokens, chosen), device="cuda")
    seen = torch.ones(tokens, chosen, dtype=torch.bool, device="cuda")
    samples = per_call(
        lambda call: gpu_attention.attend_rows(query, rows, slots[call], seen, 0.06, latent)
    )
    floor = tokens * chosen * rows.shape[1] * rows.element_size() / copy
    return {
        "rows": kind,
        "queries": tokens,
        "seconds": median(samples),
        "floor_s": floor,
        "samples_s": samples,
    }


def steps(config: ModelConfig, sparse: Weights, context: int) -> list[dict[str, Any]]:
    size, vocab = config.hidden_size, config.vocab_size
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    others = [random_layer(config, layer) for layer in range(2, config.num_hidden_layers)]
    weights = Loaded(
        torch.randn(vocab, size, **kind),
        torch.ones(size, **kind),
        torch.randn(vocab, size, **kind).mul_(size**-0.5),
        (random_layer(config, 0), sparse, *others),
        "packed",
    )
    pages = -(-(context + 1) // PAGE_TOKENS)
    cache = PagedCache(
        config, kind="bf16", num_pages=1 + pages * max(BATCHES), mtp=False,
        device=torch.device("cuda"),
    )  # fmt: skip
    results = []
    for eager in (True, False):
        runner = Runner(
            weights, config, cache, dtype=torch.bfloat16, num_positions=context + 64, eager=eager
        )
        for batch in BATCHES:
            samples = sampled(decode_step(runner, batch, context, pages))
            results.append(
                {
                    "graphs": not eager,
                    "batch": batch,
                    "context": context,
                    "layers": config.num_hidden_layers,
                    "step_s": median(samples),
                    "tokens_per_s": batch / median(samples),
                    "samples_s": samples,
                }
            )
    return results


def decode_step(runner: Runner, batch: int, context: int, pages: int) -> Callable[[], object]:
    """A step of ``batch`` sequences of ``context`` tokens each, of ever other last tokens."""
    chunks = []
    for number in range(batch):
        own = list(range(1 + number * pages, 1 + (number + 1) * pages))
        request: Any = SimpleNamespace(tokens=[0] * (context + 1), pages=own)
        chunks.append(Chunk(request, context, 1, (), True))
    generator = torch.Generator().manual_seed(batch)

    def step() -> torch.Tensor:
        for chunk in chunks:
            chunk.request.tokens[-1] = int(torch.randint(150000, (), generator=generator))
        return runner.logits(runner.target(chunks)).argmax(-1).cpu()

    return step


def engines(batch: int, device: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Seconds of texts of 64 tokens after prompts of 128, from the first one's second token on."""
    from engine_models import pack_experts

    ways: list[dict[str, Any]] = [
        {"async_scheduling": True},
        {"async_scheduling": False},
        {"async_scheduling": False, "enforce_eager": True},
        {"num_speculative_tokens": 1},
        {"num_speculative_tokens": 3},
        {"num_speculative_tokens": 3, "enforce_eager": True},
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = pack_experts(
            REPOSITORY / "examples" / "tiny-glm", Path(folder) / "packed", lambda *_: True
        )
        built = [
            Engine(model, device=device, max_num_batched_tokens=128 * batch, max_num_seqs=batch,
                   enable_prefix_caching=False, **way)
            for way in ways
        ]  # fmt: skip
    samples: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for engine, own in zip(built, samples, strict=True):
            own.append(decoding_seconds(engine, batch))
    return [
        {
            "batch": batch,
            **way,
            "tokens_per_s": batch * TEXT / median(own[1:]),  # the first one warmed up
            "mean_acceptance_length": engine.stats().get("mean_acceptance_length"),
            "samples_s": own[1:],
        }
        for way, engine, own in zip(ways, built, samples, strict=True)
    ]


def decoding_seconds(engine: Engine, batch: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=TEXT + 1, ignore_eos=True)
    choose = random.Random(0)
    for number in range(batch):
        engine.add(f"{number}", [choose.randrange(2000) for _ in range(128)], params)
    while not engine.step():
        pass
    begun = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
