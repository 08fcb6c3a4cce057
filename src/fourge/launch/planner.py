"""Checkpoint, machine and profile -> a plan that fits, every choice with its reason.

The plan is the same for both engines but for what they differ in; vllm.py and sglang.py turn it
into options. What does not fit is refused with the figures and with what would fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fourge.errors import LaunchError
from fourge.launch import pattern as index_pattern
from fourge.launch.hardware import Hardware, machines
from fourge.launch.memory import GIB, Load, Memory, Parallel, lay_out
from fourge.launch.releases import SM120_INDEX_TOPK
from fourge.launch.served import Served
from fourge.models.config import ModelConfig

ENGINES = ("vllm", "sglang")
PROFILES = ("latency", "throughput", "agentic-safe")
# Sequences at once; throughput takes what the GPU's file says.
SEQUENCES = {"latency": 8, "agentic-safe": 32}
DRAFTS = 3  # what both engines' documentation proposes for one MTP layer
# A cache that holds fewer tokens than this per sequence serves fewer sequences instead.
TOKENS_PER_SEQUENCE = 8192
SMALLEST_CHUNK = 2048
PACKED_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was asked for; None leaves the choice to the planner."""

    engine: str
    hardware: Hardware
    profile: str = "latency"
    context: int | None = None
    mtp: bool | None = None
    pattern: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision, in one line."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A launch that fits. ``kv`` is "fp8" or "bf16"; ``choices`` say why."""

    request: Request
    served: Served
    parallel: Parallel
    load: Load
    kv: str
    memory: Memory
    context: int
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]

    @property
    def engine(self) -> str:
        return self.request.engine

    @property
    def hardware(self) -> Hardware:
        return self.request.hardware

    @property
    def family(self) -> int:
        return self.request.hardware.gpu.family

    @property
    def tokens(self) -> int:
        """Tokens in all caches: replicas of data-parallel attention have one each."""
        return self.memory.tokens * self.parallel.data


def make_plan(served: Served, request: Request) -> Plan:
    """The plan; LaunchError if the model does not fit, or cannot run there at all."""
    if request.pattern is not None:
        kinds = index_pattern.layer_kinds(
            request.pattern, served.raw, served.config.num_hidden_layers
        )
        served = replace(served, config=replace(served.config, indexer_types=kinds))
    _check_context(served, request)
    _check_architecture(served, request)
    _check_mtp(served, request)
    fitting = next(_fitting(served, request), None)
    if fitting is None:
        raise LaunchError(_refusal(served, request))
    parallel, load, memory = fitting
    context = request.context or _context(served.config, memory.tokens)
    plan = Plan(
        request=request,
        served=served,
        parallel=parallel,
        load=load,
        kv=kv_dtype(served.config),
        memory=memory,
        context=context,
        choices=(),
        warnings=(),
    )
    return replace(plan, choices=tuple(_choices(plan)), warnings=tuple(_warnings(plan)))


def kv_dtype(config: ModelConfig) -> str:
    """fp8 wherever the engines' FP8 layouts are made for the model's sizes."""
    return "fp8" if (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64) else "bf16"


def _check_context(served: Served, request: Request) -> None:
    longest = served.config.max_position_embeddings
    if request.context is not None and not 0 < request.context <= longest:
        raise LaunchError(
            f"--context {request.context} is asked for; the model's max_position_embeddings allow"
            f" 1 to {longest} tokens."
        )


def _check_architecture(served: Served, request: Request) -> None:
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


def _check_mtp(served: Served, request: Request) -> None:
    if not request.mtp:
        return
    if not served.has_mtp:
        raise LaunchError(
            f"--mtp on: {served.folder} stores no MTP layer; leave it out, or take a checkpoint"
            " with one (fourge quantize --mtp bf16)."
        )
    if request.engine == "sglang" and served.mtp_experts == "nvfp4":
        raise LaunchError(
            "--mtp on: the MTP layer is NVFP4, and SGLang 0.5.23 reads its weights as unquantized"
            " (deepseek_nextn.py:75-79); leave it out, or use --engine vllm."
        )
    if request.engine == "vllm" and request.hardware.hosts > 1:
        raise LaunchError(
            "--mtp on: across hosts vLLM runs a pipeline, which rules out asynchronous scheduling"
            " with drafting; leave it out, or use --engine sglang."
        )


def wants_mtp(served: Served, request: Request) -> bool:
    """Whether drafting is planned first: asked for, or possible and worth it at low load."""
    if request.mtp is not None:
        return request.mtp
    possible = (
        served.has_mtp
        and not (request.engine == "sglang" and served.mtp_experts == "nvfp4")
        and not (request.engine == "vllm" and request.hardware.hosts > 1)
    )
    return possible and request.profile == "latency"


def _fitting(served: Served, request: Request) -> Iterator[tuple[Parallel, Load, Memory]]:
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


def _context(config: ModelConfig, tokens: int) -> int:
    """The model's own context, or what the cache holds of it, by pages of 64 tokens."""
    if tokens >= config.max_position_embeddings:
        return config.max_position_embeddings
    return tokens // 64 * 64


# -- what does not fit ----------------------------------------------------------------------------


def _refusal(served: Served, request: Request) -> str:
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
            _check_architecture(served, other)
            _check_mtp(served, other)
        except LaunchError:
            continue
        if next(_fitting(served, other), None) is not None:
            found.append(machine.name)
    if not found:
        return "; no machine that fourge knows would do"
    return f"; {', '.join(found[:3])} would do"


# -- why ------------------------------------------------------------------------------------------


def _choices(plan: Plan) -> Iterator[Choice]:
    yield _parallel_choice(plan)
    yield Choice(
        "context",
        f"{plan.context:,} tokens",
        f"{plan.tokens:,} tokens fit into {plan.memory.cache / GIB:.2f} GiB"
        f"{' on each replica' if plan.parallel.data > 1 else ''} at"
        f" {plan.memory.bytes_per_token:,} bytes per token"
        + ("" if plan.request.context else "; the model's own limit, or what fits of it"),
    )
    yield Choice(
        "sequences",
        str(plan.load.sequences),
        f"profile {plan.request.profile}, at least"
        f" {min(TOKENS_PER_SEQUENCE, plan.tokens):,} tokens of cache for each",
    )
    yield _mtp_choice(plan)
    yield _kv_choice(plan)
    yield Choice(
        "index pattern",
        plan.request.pattern or "off",
        "asked for: quality is traded for speed"
        if plan.request.pattern
        else "every layer selects by itself, as the model was trained"
        if index_pattern.trained(plan.served.raw) is None
        else "the sharing that the model was trained with",
    )


def _parallel_choice(plan: Plan) -> Choice:
    parallel, gpus = plan.parallel, plan.hardware.gpus
    if parallel.data > 1:
        value = f"data parallel attention x{parallel.data}, experts spread over {parallel.gpus}"
        reason = "no cache is held twice, which throughput on NVLink gains from"
    elif parallel.pipeline > 1:
        value = f"tensor parallel x{parallel.tensor}, pipeline x{parallel.pipeline}"
        reason = "the network between hosts carries hidden states only, once per stage"
    else:
        value = f"tensor parallel x{parallel.tensor}"
        reason = "every GPU reads its part of each weight, which is what a token waits for"
    if parallel.gpus < gpus:
        reason += f"; {gpus - parallel.gpus} GPUs stay idle: {tensor_fault(plan.served, gpus)}"
    return Choice("parallelism", value, reason)


def _mtp_choice(plan: Plan) -> Choice:
    request, served = plan.request, plan.served
    if plan.load.drafts:
        reason = "drafting pays at low load; greedy drafts with standard rejection are lossless"
        return Choice("MTP", f"{plan.load.drafts} tokens", reason)
    if not served.has_mtp:
        reason = "the checkpoint stores no MTP layer"
    elif request.mtp is False:
        reason = "asked for"
    elif request.engine == "sglang" and served.mtp_experts == "nvfp4":
        reason = "SGLang 0.5.23 reads an NVFP4 MTP layer as unquantized"
    elif request.engine == "vllm" and request.hardware.hosts > 1:
        reason = "vLLM's pipeline across hosts rules out asynchronous scheduling with drafting"
    elif request.profile == "agentic-safe":
        reason = "drafting has corrupted streamed tool calls in several releases"
    elif request.profile == "throughput":
        reason = "at high load a GPU has no idle time to draft in"
    else:
        reason = "its weights and graphs would leave too little for the cache"
    return Choice("MTP", "off", reason)


def _kv_choice(plan: Plan) -> Choice:
    if plan.kv == "fp8":
        return Choice("KV cache", "fp8", "half of BF16's bytes, in the layout made for this model")
    config = plan.served.config
    return Choice(
        "KV cache",
        "bf16",
        f"FP8 layouts are made for latents of 512 and 64, this model has {config.kv_lora_rank}"
        f" and {config.qk_rope_head_dim}",
    )


def _warnings(plan: Plan) -> Iterator[str]:
    yield from plan.served.config.warnings
    if plan.request.pattern:
        yield (
            "the index pattern trades quality for speed and was not part of this model's training;"
            " measure it beyond 2,048 tokens before you rely on it"
        )
    if plan.family == 90 and plan.served.is_nvfp4 and plan.served.weights.total > 400e9:
        yield (
            "Hopper has no FP4 arithmetic: experts are computed in 16 bits (Marlin); where it"
            " fits, the FP8 checkpoint of the model is faster here"
        )
    if plan.family == 120 and plan.kv == "bf16" and plan.served.config.uses_dsa:
        yield (
            "sparse attention for SM12x is made for FP8 caches of GLM's sizes, which this model"
            " does not have: it may fail to start"
        )
    if plan.load.drafts and plan.request.profile == "throughput":
        yield "drafting at this load costs throughput"
