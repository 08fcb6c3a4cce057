"""Rules about several parts of a launch command at once, and what a command lacks.

Each function yields findings about the part that is to be changed; check.py lets them overrule the
milder ones about that part alone.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fourge.launch.catalogue import Catalogue
from fourge.launch.command import Command
from fourge.launch.releases import SM120_INDEX_TOPK
from fourge.launch.rules import Finding

EVERYWHERE = ("0.0.0.0", "::", "[::]")
OPEN = (
    "every host on the network may use the server, since no --api-key is given; it listens on this"
    " host alone now"
)
# SM family -> MoE backends of that family alone.
BACKENDS_OF = {
    "flashinfer_trtllm": 100,
    "flashinfer_trtllm_routed": 100,
    "b12x": 120,
    "flashinfer_b12x": 120,
}
VLLM_SHARE = 0.92


@dataclass
class View:
    """A command to look values up in, by the options' full names."""

    command: Command
    catalogue: Catalogue
    family: int | None
    config: dict[str, Any] | None

    def canonical(self, flag: str) -> str:
        """The full name, of an abbreviation too where it is clear."""
        spec = self.catalogue.find(flag)
        if spec is not None:
            return spec.flag
        full = self.catalogue.prefixed(flag)
        return full[0] if len(full) == 1 else flag

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.canonical(one.flag) for one in self.command.arguments)

    @cached_property
    def options(self) -> dict[str, str]:
        """Full name -> value; the last one of several."""
        return {self.canonical(one.flag): " ".join(one.values) for one in self.command.arguments}

    @cached_property
    def flags(self) -> dict[str, str]:
        """Full name -> name as it was written."""
        return {self.canonical(one.flag): one.flag for one in self.command.arguments}

    @property
    def model(self) -> str:
        return (
            self.command.model
            or self.options.get("--model-path")
            or self.options.get("--model", "")
        )

    def number(self, name: str, default: float) -> float:
        try:
            return float(self.options.get(name, default))
        except ValueError:
            return default

    @cached_property
    def drafting(self) -> dict[str, Any]:
        """vLLM's speculative config, from JSON or from dotted options."""
        found: dict[str, Any] = {}
        try:
            value = json.loads(self.options.get("--speculative-config", "{}"))
            found |= value if isinstance(value, dict) else {}
        except ValueError:
            pass
        for one in self.command.arguments:
            base, dot, key = one.flag.partition(".")
            if dot and self.canonical(base) == "--speculative-config":
                found[key] = " ".join(one.values)
        return found

    def finding(
        self, name: str, verdict: str, reason: str, becomes: tuple[str, ...] | None = None
    ) -> Finding:
        """About the option called ``name``."""
        flag = self.flags.get(name, name)
        return Finding("option", flag, self.options.get(name, ""), verdict, reason, becomes)


def relations(view: View, findings: Sequence[Finding]) -> Iterator[Finding]:
    """Everything that only shows when parts are seen together."""
    yield from _common(view)
    if view.command.engine == "vllm":
        yield from _vllm(view)
    else:
        yield from _sglang(view, findings)


def _common(view: View) -> Iterator[Finding]:
    if not view.model:
        yield Finding("model", "model", "", "invalid", "the command names no model")
    environment = dict(view.command.environment)
    has_key = "--api-key" in view.options or "VLLM_API_KEY" in environment
    if view.options.get("--host") in EVERYWHERE and not has_key:
        if _has_own_network(view):
            reason = (
                "needed inside the container's own network; without --api-key publish the port on"
                " 127.0.0.1 alone"
            )
            yield view.finding("--host", "kept", reason)
        else:
            flag = view.flags["--host"]
            yield view.finding("--host", "dangerous", OPEN, (flag, "127.0.0.1"))
    name = "--moe-backend" if view.command.engine == "vllm" else "--moe-runner-backend"
    backend = view.options.get(name, "")
    needed = BACKENDS_OF.get(backend)
    if view.family is not None and needed is not None and needed != view.family:
        reason = f"{backend} runs on SM{needed // 10}x only, these GPUs are SM{view.family // 10}x"
        yield view.finding(name, "invalid", reason, ())


def _has_own_network(view: View) -> bool:
    container = view.command.container
    if container is None:
        return False
    if container.program == "compose":
        service = container.document["services"][container.service]
        return service.get("network_mode") != "host"
    return ("--network", "host") not in container.options and (
        "--net",
        "host",
    ) not in container.options


# -- vLLM -----------------------------------------------------------------------------------------


def _vllm(view: View) -> Iterator[Finding]:
    yield from _vllm_tools(view)
    yield from _vllm_drafts(view)
    yield from _vllm_memory(view)
    stages = view.number("--pipeline-parallel-size", 1)
    if "--async-scheduling" in view.options and stages > 1:
        reason = "an error together with --pipeline-parallel-size; left out, vLLM decides"
        yield view.finding("--async-scheduling", "invalid", reason, ())
    topk = (view.config or {}).get("index_topk")
    if view.family == 120 and topk not in (None, SM120_INDEX_TOPK):
        reason = (
            f"its index_topk is {topk}, FLASHINFER_MLA_SPARSE_SM120 needs {SM120_INDEX_TOPK}:"
            " vLLM has no attention for it on these GPUs"
        )
        yield Finding("model", "model", view.model, "invalid", reason)


def _vllm_tools(view: View) -> Iterator[Finding]:
    if "--enable-auto-tool-choice" in view.options and "--tool-call-parser" not in view.options:
        flag = view.flags["--enable-auto-tool-choice"]
        reason = "vLLM refuses to start without --tool-call-parser"
        fixed = (flag, "--tool-call-parser", "glm47")
        yield view.finding("--enable-auto-tool-choice", "invalid", reason, fixed)


def _vllm_drafts(view: View) -> Iterator[Finding]:
    drafting = view.drafting
    if "--speculative-config" not in view.options or not drafting:
        return
    if drafting.get("use_local_argmax_reduction") is True:
        other = None
        if drafting.get("draft_sample_method") == "probabilistic":
            other = "draft_sample_method 'probabilistic'"
        elif drafting.get("enable_adaptive_verification") is True:
            other = "enable_adaptive_verification"
        if other is not None:
            kept = {k: v for k, v in drafting.items() if k != "use_local_argmax_reduction"}
            reason = f"use_local_argmax_reduction is an error together with {other}"
            flag = view.flags["--speculative-config"]
            fixed = (flag, json.dumps(kept, separators=(",", ":")))
            yield view.finding("--speculative-config", "invalid", reason, fixed)


def _vllm_memory(view: View) -> Iterator[Finding]:
    share = view.number("--gpu-memory-utilization", VLLM_SHARE)
    environment = dict(view.command.environment)
    name = "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"
    if share >= VLLM_SHARE and environment.get(name) == "0":
        reason = f"no room is kept for CUDA graphs, with a share of {share:g} of the memory"
        flag = "--gpu-memory-utilization"
        if flag in view.options:
            yield view.finding(flag, "dangerous", reason, (view.flags[flag], "0.9"))
    drafts = int(view.drafting.get("num_speculative_tokens") or 0)
    sequences = view.number("--max-num-seqs", 0)
    capture = view.number("--max-cudagraph-capture-size", 0)
    if sequences and capture and capture < sequences * (drafts + 1):
        reason = (
            f"smaller than {sequences:g} sequences x {drafts + 1} tokens: larger batches run"
            " without a graph"
        )
        yield view.finding("--max-cudagraph-capture-size", "kept", reason)


# -- SGLang ---------------------------------------------------------------------------------------


def _sglang(view: View, findings: Sequence[Finding]) -> Iterator[Finding]:
    yield from _sglang_attention(view)
    yield from _sglang_parallel(view)
    yield from _visible_devices(view)
    steps = "--speculative-num-steps"
    rest = [
        name
        for name in ("--speculative-eagle-topk", "--speculative-num-draft-tokens")
        if name in view.options
    ]
    if rest and steps not in view.options:
        reason = f"an error without {steps}"
        yield from (view.finding(name, "invalid", reason, ()) for name in rest)
    shares = any(
        "shared" in (one.becomes or (one.value,))[-1]
        for one in findings
        if one.name == "--json-model-override-args"
    )
    if "--enable-two-batch-overlap" in view.options and shares:
        reason = "an error together with layers that share their indices"
        yield view.finding("--enable-two-batch-overlap", "invalid", reason, ())


def _sglang_attention(view: View) -> Iterator[Finding]:
    names = ("--dsa-prefill-backend", "--dsa-decode-backend")
    old = ("--nsa-prefill-backend", "--nsa-decode-backend")
    given = [name for name in (*names, *old) if view.options.get(name) == "tilelang"]
    if len(given) == 1 and view.options.get("--kv-cache-dtype") == "fp8_e4m3":
        reason = (
            "tilelang reads an FP8 cache of its own layout: prefill and decode both, or neither"
        )
        yield view.finding(given[0], "invalid", reason, ())
    topk = view.number("--speculative-eagle-topk", 1)
    if view.number("--dcp-size", 1) > 1 and topk != 1:
        reason = "decode context parallelism with sparse attention needs --speculative-eagle-topk 1"
        flag = view.flags["--speculative-eagle-topk"]
        yield view.finding("--speculative-eagle-topk", "invalid", reason, (flag, "1"))


def _sglang_parallel(view: View) -> Iterator[Finding]:
    replicas = view.options.get("--dp-size", "1")
    if "--enable-dp-attention" in view.options:
        reason = "deprecated; the number of groups is --attn-dp-size now"
        fixed = () if "--attn-dp-size" in view.options else ("--attn-dp-size", replicas)
        yield view.finding("--enable-dp-attention", "renamed", reason, fixed)
        if "--dp-size" in view.options:
            reason = "with --enable-dp-attention this was the number that --attn-dp-size is now"
            yield view.finding("--dp-size", "renamed", reason, ())
    elif view.number("--attn-dp-size", 1) > 1 and view.number("--dp-size", 1) > 1:
        reason = "replicas together with --attn-dp-size are an error"
        yield view.finding("--dp-size", "invalid", reason, ())
    if view.number("--nnodes", 1) > 1 and "--dist-init-addr" not in view.options:
        reason = "several hosts need --dist-init-addr HOST:PORT, where they meet"
        yield view.finding("--nnodes", "invalid", reason, None)


def _visible_devices(view: View) -> Iterator[Finding]:
    name = "NVIDIA_VISIBLE_DEVICES"
    value = dict(view.command.environment).get(name)
    if value is None or view.command.container is not None:
        return
    numbers = [part for part in value.split(",") if part.strip().isdigit()]
    reason = "only a container runtime reads it; CUDA reads CUDA_VISIBLE_DEVICES"
    if numbers and "0" not in numbers:
        reason += f", and GPUs are numbered from 0: {value} is off by one"
        numbers = [str(number) for number in range(len(numbers))]
    fixed = (f"CUDA_VISIBLE_DEVICES={','.join(numbers)}",) if numbers else ()
    if "CUDA_VISIBLE_DEVICES" in dict(view.command.environment):
        fixed = ()
    yield Finding("variable", name, value, "ignored", reason, fixed)


# -- what is missing ------------------------------------------------------------------------------


def advice(view: View) -> Iterator[str]:
    """What the command could have and lacks."""
    given = view.options
    if view.command.engine == "vllm":
        if "--max-model-len" not in given:
            yield (
                "--max-model-len is not given: the model's whole context must fit, or vLLM does"
                " not start"
            )
        if "--chat-template-content-format" not in given:
            yield "--chat-template-content-format string is what GLM's chat template expects"
        if "--tool-call-parser" in given and "--enable-auto-tool-choice" not in given:
            yield "--tool-call-parser without --enable-auto-tool-choice parses no tool call"
        if "--host" not in given and "--api-key" not in given:
            yield "--host is not given: vLLM listens on every interface; --host 127.0.0.1 does not"
        return
    if "--speculative-algorithm" not in given:
        yield (
            "MTP is off, although SGLang has it: --speculative-algorithm NEXTN (3 steps, 4 draft"
            " tokens) drafts with the checkpoint's own MTP layer"
        )
    if "--context-length" not in given:
        yield "--context-length is not given: requests may be longer than the cache"
    if "--enable-metrics" not in given:
        yield "--enable-metrics is not given: the acceptance of drafts cannot be watched"
