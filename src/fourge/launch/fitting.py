"""What fits on a machine: ways to divide a model and loads, the best first; and what does not.

A refusal has the figures, and names known machines on which the same would fit.
"""

from collections.abc import Iterator
from dataclasses import replace

from fourge.errors import LaunchError
from fourge.launch.hardware import machines
from fourge.launch.memory import Load, Memory, Parallel, lay_out
from fourge.launch.plan import Request
from fourge.launch.releases import SM120_INDEX_TOPK
from fourge.launch.served import Served
from fourge.models.config import ModelConfig

# Sequences at once; throughput takes what the GPU's file says.
SEQUENCES = {"latency": 8, "agentic-safe": 32}
DRAFTS = 3  # what both engines' documentation proposes for one MTP layer
# A cache that holds fewer tokens than this per sequence serves fewer sequences instead.
TOKENS_PER_SEQUENCE = 8192
SMALLEST_CHUNK = 2048
PACKED_ALIGNMENT = 16


def kv_dtype(config: ModelConfig) -> str:
    """fp8 wherever the engines' FP8 layouts are made for the model's sizes."""
    return "fp8" if (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64) else "bf16"


def check_context(served: Served, request: Request) -> None:
    longest = served.config.max_position_embeddings
    if request.context is not None and not 0 < request.context <= longest:
        raise LaunchError(
            f"--context {request.context} is asked for; the model's max_position_embeddings allow"
            f" 1 to {longest} tokens."
        )


def check_architecture(served: Served, request: Request) -> None:
    gpu, config = request.hardware.gpu, served.config
    if gpu.family not in (90, 100, 120):
        raise LaunchError(
            f"{gpu.title} has compute capability {gpu.architecture / 10}; sparse attention and"
            " NVFP4 experts run on Hopper (9.0) and Blackwell (10.x, 12.x): choose such a machine."
        )
    is_sm120_vllm = gpu.family == 120 and request.engine == "vllm"
    if config.uses_dsa and is_sm120_vllm and config.index_topk != SM120_INDEX_TOPK:
        raise LaunchError(
            f"this model has index_topk {config.index_topk}; vLLM's only sparse attention for"
            f" {gpu.title} (FLASHINFER_MLA_SPARSE_SM120) needs {SM120_INDEX_TOPK}: use"
            " --engine sglang, or Hopper or data-centre Blackwell."
        )


def mtp_obstacle(served: Served, request: Request) -> str | None:
    """Why the engine cannot draft with the checkpoint's MTP layer there, or None."""
    if not served.has_mtp:
        return "the checkpoint stores no MTP layer"
    if request.engine == "sglang" and served.mtp_experts == "nvfp4":
        return "SGLang 0.5.23 reads an NVFP4 MTP layer as unquantized (deepseek_nextn.py:75-79)"
    if request.engine == "vllm" and request.hardware.hosts > 1:
        return "vLLM's pipeline across hosts rules out asynchronous scheduling with drafting"
    return None


def check_mtp(served: Served, request: Request) -> None:
    """Raise LaunchError where drafting is asked for and cannot be."""
    obstacle = mtp_obstacle(served, request) if request.mtp else None
    if obstacle is not None:
        raise LaunchError(f"--mtp on: {obstacle}; leave the option out, or change what hinders.")


def wants_mtp(served: Served, request: Request) -> bool:
    """Whether drafting is planned first: asked for, or possible and worth it at low load."""
    if request.mtp is not None:
        return request.mtp
    return request.profile == "latency" and mtp_obstacle(served, request) is None


def fitting(served: Served, request: Request) -> Iterator[tuple[Parallel, Load, Memory]]:
    """What fits, the best first."""
    needed = request.context or min(TOKENS_PER_SEQUENCE, served.config.max_position_embeddings)
    for parallel in arrangements(served, request):
        for load in _loads(served, request):
            memory = lay_out(
                served,
                request.hardware,
                request.engine,
                parallel,
                load,
                kv=kv_dtype(served.config),
            )
            enough = max(needed, TOKENS_PER_SEQUENCE * load.sequences)
            if memory.tokens >= (needed if load.sequences == 1 else enough):
                yield parallel, load, memory


def _loads(served: Served, request: Request) -> Iterator[Load]:
    """The profile's load, then smaller ones: fewer sequences, no drafting, shorter chunks."""
    gpu = request.hardware.gpu
    most = gpu.sequences[request.engine]
    first = min(most, SEQUENCES.get(request.profile, most))
    drafts = DRAFTS if wants_mtp(served, request) else 0
    chunk = gpu.chunk[request.engine]
    counts = [first >> shift for shift in range(first.bit_length())]
    for size in dict.fromkeys((chunk, min(chunk, SMALLEST_CHUNK))):
        for number in (drafts, 0) if drafts and request.mtp is None else (drafts,):
            for count in counts:
                yield Load(count, number, size)


def arrangements(served: Served, request: Request) -> list[Parallel]:
    """Ways to divide the model over the machine that its shapes allow, the preferred one first."""
    hardware, config = request.hardware, served.config
    found: list[Parallel] = []
    spread = (
        request.profile == "throughput"
        and hardware.hosts == 1
        and hardware.gpu.family == 100
        and hardware.gpu.link == "nvlink"
        and hardware.gpus > 1
        and config.n_routed_experts % hardware.gpus == 0
    )
    if spread:
        found.append(Parallel(1, hardware.gpus))
    if request.engine == "vllm" and hardware.hosts > 1:
        found += [Parallel(n, 1, hardware.hosts) for n in _tensor_sizes(served, hardware.per_host)]
    elif hardware.hosts > 1:
        # Every host takes part in one launch, so all of its GPUs do.
        found += [Parallel(n) for n in _tensor_sizes(served, hardware.gpus) if n == hardware.gpus]
    else:
        found += [Parallel(n) for n in _tensor_sizes(served, hardware.gpus)]
    return found


def _tensor_sizes(served: Served, most: int) -> list[int]:
    """Divisors of the number of GPUs that cut heads and experts evenly, the largest first."""
    return [n for n in range(most, 0, -1) if most % n == 0 and tensor_fault(served, n) is None]


def tensor_fault(served: Served, size: int) -> str | None:
    """Why the model cannot be cut into ``size`` parts, or None."""
    config = served.config
    if config.num_attention_heads % size:
        return f"{config.num_attention_heads} heads do not divide by {size}"
    inner = config.moe_intermediate_size
    if inner % size or config.vocab_size % size:
        return f"experts of {inner} or {config.vocab_size} tokens do not divide by {size}"
    if served.is_nvfp4 and (inner // size) % PACKED_ALIGNMENT:
        return f"{inner} / {size} is no multiple of NVFP4's blocks of {PACKED_ALIGNMENT}"
    return None


def refusal(served: Served, request: Request) -> str:
    hardware = request.hardware
    possible = arrangements(served, request)
    if not possible:
        fault = tensor_fault(served, hardware.gpus)
        return (
            f"the model cannot be divided over {hardware.name}: {fault}; choose a number of GPUs"
            f" that divides its shapes{_proposal(served, request)}."
        )
    memory = _leanest(served, request, possible)
    gpu = hardware.gpu
    share = int(gpu.memory * memory.share)
    weights = memory.weights + memory.mtp
    others = memory.activations + memory.graphs + memory.runtime
    figures = (
        f"weights take {weights / 1e9:.1f} GB per GPU, activations and runtime"
        f" {others / 1e9:.1f} GB, of {share / 1e9:.1f} GB that the engine may take"
        f" ({memory.share:g} of {gpu.memory / 1e9:.1f} GB)"
    )
    if memory.tokens == 0:
        return f"the model does not fit on {hardware.name}: {figures}{_proposal(served, request)}."
    wanted = request.context or TOKENS_PER_SEQUENCE
    return (
        f"a context of {wanted:,} tokens does not fit on {hardware.name}: {figures}, which leaves"
        f" {memory.tokens:,} tokens of {memory.bytes_per_token:,} bytes; give --context"
        f" {memory.tokens // 64 * 64} or less{_proposal(served, request)}."
    )


def _leanest(served: Served, request: Request, possible: list[Parallel]) -> Memory:
    """The table of the arrangement and load that leave the most for the cache."""
    tables = [
        lay_out(served, request.hardware, request.engine, parallel, load,
                kv=kv_dtype(served.config))
        for parallel in possible
        for load in _loads(served, request)
    ]  # fmt: skip
    return max(tables, key=lambda memory: memory.cache)


def _proposal(served: Served, request: Request) -> str:
    """The smallest known machines that would do, a few of them."""
    found = []
    for machine in machines():
        other = replace(request, hardware=machine)
        try:
            check_architecture(served, other)
            check_mtp(served, other)
        except LaunchError:
            continue
        if next(fitting(served, other), None) is not None:
            found.append(machine.name)
    if not found:
        return "; no machine that fourge knows would do"
    return f"; {', '.join(found[:3])} would do"
