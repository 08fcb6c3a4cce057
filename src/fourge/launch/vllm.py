"""A plan as a command for vLLM 0.33.0.

What is left to vLLM: attention backends (platforms/cuda.py:101-155), asynchronous scheduling (given
by hand it turns a soft incompatibility into an error), chunked prefill and prefix caching (on).
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fourge.launch import pattern as index_pattern
from fourge.launch.options import (
    Endpoint,
    HostCommand,
    Option,
    Variable,
    common_environment,
    family,
    host_names,
    sampling,
    sampling_choice,
)
from fourge.launch.plan import Choice, Plan
from fourge.launch.releases import RELEASES

RAY_PORT = 6379
# How NVFP4 experts are computed where "auto" is not the choice (fused_moe/oracle/nvfp4.py:199-213).
MOE_BACKENDS = {
    120: ("flashinfer_cutlass", "CUTLASS is the proven NVFP4 path of SM12x; trtllm is SM10x only"),
    90: ("marlin", "Hopper has no FP4 arithmetic; Marlin computes in 16 bits on packed weights"),
}

# What "auto" comes to with an FP8 cache (platforms/cuda.py:101-155).
ATTENTION = {
    90: "FLASH_ATTN_MLA_SPARSE",
    100: "FLASHINFER_MLA_SPARSE",
    120: "FLASHINFER_MLA_SPARSE_SM120",
}


def commands(plan: Plan, endpoint: Endpoint, hosts: Sequence[str], model: str) -> list[HostCommand]:
    """One command per host: the engine runs on the first, the others join its Ray cluster."""
    names = host_names(plan, hosts)
    environment = tuple(_environment(plan, endpoint))
    first = HostCommand(
        names[0],
        (),
        (*RELEASES["vllm"].program, model),
        model,
        tuple(options(plan, endpoint)),
        environment,
    )
    if len(names) == 1:
        return [first]
    return [_with_ray(first, number, names, plan) for number in range(len(names))]


def _with_ray(first: HostCommand, number: int, names: list[str], plan: Plan) -> HostCommand:
    host, head = names[number], names[0]
    place = ["--head", f"--port={RAY_PORT}"] if number == 0 else [f"--address={head}:{RAY_PORT}"]
    start = ["ray", "start", *place, f"--node-ip-address={host}"]
    start.append(f"--num-gpus={plan.gpus_per_host}")
    if number:
        start.append("--block")
    environment = (
        *first.environment,
        Variable("VLLM_HOST_IP", host, "the address by which the other hosts reach this one"),
    )
    return HostCommand(
        host=host,
        setup=(tuple(start),),
        program=first.program if number == 0 else (),
        model=first.model,
        options=first.options if number == 0 else (),
        environment=environment,
    )


def options(plan: Plan, endpoint: Endpoint) -> Iterator[Option]:
    """Every option, in the order of the command."""
    yield Option("--served-model-name", endpoint.model_name, "the name that clients ask for")
    yield Option("--host", endpoint.host, "reachable from this host alone unless asked otherwise")
    yield Option("--port", str(endpoint.port), "where clients connect")
    yield from _parallel(plan)
    yield from _memory(plan)
    yield from _kernels(plan)
    yield from _chat(plan)
    if plan.request.pattern:
        keys = index_pattern.override(plan.request.pattern, plan.served.config.num_hidden_layers)
        yield Option(
            "--hf-overrides", _json(keys), "the index pattern: vLLM reads index_topk_pattern"
        )


def _parallel(plan: Plan) -> Iterator[Option]:
    parallel = plan.parallel
    if parallel.tensor > 1:
        yield Option("--tensor-parallel-size", str(parallel.tensor), "GPUs that share each matrix")
    if parallel.pipeline > 1:
        yield Option("--pipeline-parallel-size", str(parallel.pipeline), "one stage per host")
        yield Option("--distributed-executor-backend", "ray", "workers run on several hosts")
    if parallel.data > 1:
        yield Option("--data-parallel-size", str(parallel.data), "each GPU has its own requests")
        yield Option("--enable-expert-parallel", None, "experts are spread over all GPUs")
    if parallel.gpus > 1 and parallel.pipeline == 1:
        yield Option(
            "--load-format",
            "fastsafetensors",
            "reads shards in parallel, straight into GPU memory where the disk allows it",
        )


def _memory(plan: Plan) -> Iterator[Option]:
    load = plan.load
    share = plan.memory.share
    yield Option("--gpu-memory-utilization", f"{share:g}", "what this machine leaves free is known")
    yield Option("--max-model-len", str(plan.context), "what the cache holds, checked beforehand")
    yield Option("--max-num-seqs", str(load.sequences), f"profile {plan.request.profile}")
    yield Option("--max-num-batched-tokens", str(load.chunk), "tokens of one prefill step")
    yield Option(
        "--max-cudagraph-capture-size",
        str(load.graph),
        f"{load.sequences} sequences x {load.drafts + 1} tokens, so that none runs without a graph",
    )
    if plan.kv == "fp8":
        yield Option(
            "--kv-cache-dtype", "fp8", f"{plan.memory.bytes_per_token:,} bytes per token and GPU"
        )


def _kernels(plan: Plan) -> Iterator[Option]:
    served = plan.served
    backend = MOE_BACKENDS.get(plan.family) if served.is_nvfp4 else None
    if backend is not None:
        yield Option("--moe-backend", *backend)
    if plan.load.drafts:
        draft: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": plan.load.drafts}
        reason = "the checkpoint's own MTP layer; greedy drafts, standard rejection: lossless"
        if served.is_nvfp4 and served.mtp_experts == "bf16":
            draft["moe_backend"] = "triton"
            reason += "; its experts are BF16, which the target's kernels do not take"
        yield Option("--speculative-config", _json(draft), reason)


def _chat(plan: Plan) -> Iterator[Option]:
    entry = family(plan.served.config.model_type)
    parsers = entry["vllm"]
    yield Option("--tool-call-parser", parsers["tools"], "the model's own format of tool calls")
    yield Option("--enable-auto-tool-choice", None, "without it no tool call is parsed")
    if "reasoning" in parsers:
        yield Option("--reasoning-parser", parsers["reasoning"], "separates thoughts from answers")
    yield Option(
        "--chat-template-content-format", "string", "what the model's chat template expects"
    )
    if not plan.served.sampling and sampling(plan):
        yield Option(
            "--override-generation-config",
            _json(sampling(plan)),
            "the checkpoint has no generation_config.json; the publisher's recommendation",
        )


def _environment(plan: Plan, endpoint: Endpoint) -> Iterator[Variable]:
    yield from common_environment(plan)
    if endpoint.api_key is not None:
        yield Variable("VLLM_API_KEY", endpoint.api_key, "not on the command line, which ps shows")


def left_to_engine(plan: Plan) -> Iterator[Choice]:
    """What vLLM chooses by itself, and what it comes to here."""
    served = plan.served
    if served.config.uses_dsa:
        backend = ATTENTION[plan.family] if plan.kv == "fp8" else "by its size"
        yield Choice("attention", backend, "left to vLLM, which chooses by architecture")
    if not served.is_nvfp4:
        yield Choice("MoE", "auto", f"experts are {served.experts.upper()}; left to vLLM")
    elif plan.family in MOE_BACKENDS:
        yield Choice("MoE", *MOE_BACKENDS[plan.family])
    else:
        yield Choice("MoE", "flashinfer_trtllm", "left to vLLM: the first of its order on SM10x")
    yield sampling_choice(plan)
    yield Choice(
        "caches",
        "kept",
        "compiled kernels and graphs stay in ~/.cache; containers get a volume for them",
    )


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
