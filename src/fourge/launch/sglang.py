"""A plan as a command for SGLang 0.5.23.

What is left to SGLang: attention (dsa) and its kernels by architecture (arg_groups/overrides.py:
630-730), pages of 64 tokens, the draft model (the checkpoint itself), overlapped scheduling.
"""

import json
from collections.abc import Iterator, Sequence

from fourge.launch import pattern as index_pattern
from fourge.launch.options import (
    Endpoint,
    HostCommand,
    Option,
    common_environment,
    family,
    host_names,
    sampling,
    sampling_choice,
)
from fourge.launch.plan import Choice, Plan
from fourge.launch.releases import RELEASES

INIT_PORT = 20000
LARGEST_GRAPH = 256

# What dsa comes to with an FP8 cache, prefill and decode (arg_groups/overrides.py:646-735).
ATTENTION = {90: "dsa, flashmla_kv", 100: "dsa, trtllm", 120: "dsa, flashinfer_sparse_mla"}


def commands(plan: Plan, endpoint: Endpoint, hosts: Sequence[str], model: str) -> list[HostCommand]:
    """One command per host; all of them run the engine, the first one answers."""
    names = host_names(plan, hosts)
    environment = tuple(common_environment(plan))
    found = []
    for number, host in enumerate(names):
        rank = list(_rank(number, names)) if len(names) > 1 else []
        own = (Option("--model-path", model, "the checkpoint"), *options(plan, endpoint), *rank)
        found.append(HostCommand(host, (), RELEASES["sglang"].program, model, own, environment))
    return found


def _rank(number: int, names: list[str]) -> Iterator[Option]:
    yield Option("--nnodes", str(len(names)), "hosts that take part")
    yield Option("--node-rank", str(number), "which of them this one is")
    yield Option("--dist-init-addr", f"{names[0]}:{INIT_PORT}", "where the hosts meet")


def options(plan: Plan, endpoint: Endpoint) -> Iterator[Option]:
    """Every option but the model's path and the rank, in the order of the command."""
    yield Option("--served-model-name", endpoint.model_name, "the name that clients ask for")
    yield Option("--host", endpoint.host, "reachable from this host alone unless asked otherwise")
    yield Option("--port", str(endpoint.port), "where clients connect")
    if endpoint.api_key is not None:
        yield Option("--api-key", endpoint.api_key, "clients have to know it")
    yield from _parallel(plan)
    yield from _memory(plan)
    yield from _kernels(plan)
    yield from _draft(plan)
    yield from _chat(plan)
    yield Option("--enable-metrics", None, "acceptance of drafts and load can be watched")
    yield Option("--enable-cache-report", None, "answers tell how much of a prompt was cached")
    if plan.request.pattern:
        keys = index_pattern.override(plan.request.pattern, plan.served.config.num_hidden_layers)
        yield Option(
            "--json-model-override-args",
            _json(keys),
            "the index pattern: SGLang reads indexer_types before index_topk_pattern",
        )


def _parallel(plan: Plan) -> Iterator[Option]:
    parallel = plan.parallel
    if parallel.gpus > 1:
        yield Option("--tp-size", str(parallel.gpus), "GPUs that share the model")
    if parallel.data > 1:
        yield Option("--attn-dp-size", str(parallel.data), "each GPU has its own requests")
        yield Option("--moe-a2a-backend", "flashinfer", "experts are spread over all GPUs")


def _memory(plan: Plan) -> Iterator[Option]:
    load, data = plan.load, plan.parallel.data
    requests = load.sequences * data
    yield Option("--context-length", str(plan.context), "what the cache holds, checked beforehand")
    if "sglang" in plan.hardware.gpu.utilization:
        share = f"{plan.memory.share:g}"
        yield Option("--mem-fraction-static", share, "what this machine leaves free is known")
    yield Option("--max-running-requests", str(requests), f"profile {plan.request.profile}")
    yield Option(
        "--cuda-graph-max-bs-decode",
        str(min(load.sequences, LARGEST_GRAPH)),
        "a graph for every number of sequences that can run",
    )
    reason = "tokens of one prefill step" + (", shared by all GPUs" if data > 1 else "")
    yield Option("--chunked-prefill-size", str(load.chunk), reason)
    if plan.kv == "fp8":
        per_token = f"{plan.memory.bytes_per_token:,} bytes per token and GPU"
        yield Option("--kv-cache-dtype", "fp8_e4m3", per_token)


def _kernels(plan: Plan) -> Iterator[Option]:
    served = plan.served
    if served.is_nvfp4:
        yield Option("--quantization", "modelopt_fp4", "a check: the metadata says so too")
        yield Option(
            "--disable-shared-experts-fusion",
            None,
            "shared experts are BF16 and must not be fused with the NVFP4 ones",
        )
    if served.is_nvfp4 and plan.family == 90:
        yield Option("--moe-runner-backend", "marlin", "Hopper has no FP4 arithmetic")
    elif served.is_nvfp4 and plan.parallel.data > 1:
        reason = "a runner that takes experts spread over GPUs"
        yield Option("--moe-runner-backend", "flashinfer_cutlass", reason)
    if plan.family == 120:
        yield Option(
            "--disable-prefill-cuda-graph", None, "prefill graphs take memory that SM12x lacks"
        )


def _draft(plan: Plan) -> Iterator[Option]:
    drafts = plan.load.drafts
    if not drafts:
        return
    yield Option("--speculative-algorithm", "NEXTN", "the checkpoint's own MTP layer")
    yield Option("--speculative-num-steps", str(drafts), "tokens drafted one after another")
    yield Option("--speculative-eagle-topk", "1", "one draft, no tree: what one layer is good for")
    yield Option("--speculative-num-draft-tokens", str(drafts + 1), "the drafts and one more")
    if plan.served.is_nvfp4 and plan.served.mtp_experts == "bf16":
        reason = "its experts are BF16, which the target's kernels do not take"
        yield Option("--speculative-moe-runner-backend", "triton", reason)


def _chat(plan: Plan) -> Iterator[Option]:
    parsers = family(plan.served.config.model_type)["sglang"]
    yield Option("--tool-call-parser", parsers["tools"], "the model's own format of tool calls")
    if "reasoning" in parsers:
        yield Option("--reasoning-parser", parsers["reasoning"], "separates thoughts from answers")
    if sampling(plan):
        reason = "used where a request says nothing"
        yield Option("--preferred-sampling-params", _json(sampling(plan)), reason)


def left_to_engine(plan: Plan) -> Iterator[Choice]:
    """What SGLang chooses by itself, and what it comes to here."""
    served = plan.served
    if served.config.uses_dsa:
        backend = ATTENTION[plan.family] if plan.kv == "fp8" else "dsa"
        yield Choice("attention", backend, "left to SGLang, which chooses by architecture")
    if not served.is_nvfp4:
        yield Choice("MoE", "auto", f"experts are {served.experts.upper()}; left to SGLang")
    elif plan.family == 90:
        yield Choice("MoE", "marlin", "Hopper has no FP4 arithmetic")
    elif plan.family == 100 and plan.parallel.data == 1:
        yield Choice("MoE", "flashinfer_trtllm", "left to SGLang, which takes it on SM10x")
    else:
        yield Choice("MoE", "flashinfer_cutlass", "what SGLang takes here for NVFP4")
    yield sampling_choice(plan)
    yield Choice(
        "caches",
        "kept",
        "compiled kernels stay in ~/.cache; containers get a volume for them",
    )


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
