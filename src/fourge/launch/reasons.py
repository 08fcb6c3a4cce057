"""Why a plan is as it is: each decision in one line, and what its user should know."""

from collections.abc import Iterator

from fourge.launch import pattern as index_pattern
from fourge.launch.fitting import TOKENS_PER_SEQUENCE, mtp_obstacle, tensor_fault
from fourge.launch.memory import GIB
from fourge.launch.plan import Choice, Plan


def choices(plan: Plan) -> Iterator[Choice]:
    replicas = plan.parallel.data
    yield _parallel_choice(plan)
    yield Choice(
        "context",
        f"{plan.context:,} tokens",
        f"{plan.memory.tokens:,} tokens fit into {plan.memory.cache / GIB:.2f} GiB"
        f"{f' on each of {replicas} replicas' if replicas > 1 else ''} at"
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
        asked = gpus // parallel.pipeline // parallel.data
        reason += f"; {gpus - parallel.gpus} GPUs stay idle: {tensor_fault(plan.served, asked)}"
    return Choice("parallelism", value, reason)


def _mtp_choice(plan: Plan) -> Choice:
    request, served = plan.request, plan.served
    if plan.load.drafts:
        why = "asked for" if request.mtp else "drafting pays at low load"
        reason = f"{why}; greedy drafts with standard rejection are lossless"
        return Choice("MTP", f"{plan.load.drafts} tokens", reason)
    obstacle = mtp_obstacle(served, request)
    if obstacle is not None:
        reason = obstacle
    elif request.mtp is False:
        reason = "asked for"
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


def warnings(plan: Plan) -> Iterator[str]:
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
