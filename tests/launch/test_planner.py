"""Plans: what is chosen, why, and what is refused with which figures."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fourge.errors import LaunchError
from fourge.launch.memory import Load, Parallel
from fourge.launch.pattern import KNOWN
from fourge.launch.plan import PROFILES
from fourge.launch.planner import make_plan
from fourge.launch.served import Served
from launch_builders import hollow, plan_for


@pytest.mark.parametrize(
    ("engine", "machine", "profile", "parallel", "load"),
    [
        ("vllm", "8xrtx-pro-6000", "latency", Parallel(8), Load(8, 3, 8192)),
        ("vllm", "8xrtx-pro-6000", "throughput", Parallel(8), Load(32, 0, 8192)),
        ("vllm", "8xrtx-pro-6000", "agentic-safe", Parallel(8), Load(32, 0, 8192)),
        ("sglang", "8xrtx-pro-6000", "latency", Parallel(8), Load(8, 3, 4096)),
        ("vllm", "8xb200", "throughput", Parallel(1, 8), Load(128, 0, 16384)),
        ("sglang", "8xb200", "throughput", Parallel(1, 8), Load(128, 0, 16384)),
        ("vllm", "8xb200", "latency", Parallel(8), Load(8, 3, 16384)),
        ("vllm", "8xh200", "throughput", Parallel(8), Load(128, 0, 8192)),
        ("vllm", "4xh200", "throughput", Parallel(4), Load(32, 0, 8192)),
        ("vllm", "2x8xh200", "latency", Parallel(8, 1, 2), Load(8, 0, 8192)),
        ("sglang", "2x8xh200", "latency", Parallel(16), Load(8, 3, 8192)),
    ],
)
def test_choices(
    glm: Served, engine: str, machine: str, profile: str, parallel: Parallel, load: Load
):
    plan = plan_for(glm, engine, machine, profile=profile)
    assert (plan.parallel, plan.load, plan.kv) == (parallel, load, "fp8")
    assert plan.memory.tokens >= plan.context
    assert plan.memory.tokens >= 8192 * load.sequences
    for choice in plan.choices:
        assert choice.reason
        assert "\n" not in choice.reason


def test_context_is_the_models_own_or_what_fits(glm: Served):
    assert plan_for(glm, "vllm", "8xrtx-pro-6000").context == 202_752
    short = plan_for(glm, "vllm", "4xh200")
    assert short.context == short.memory.tokens // 64 * 64 < 202_752
    assert plan_for(glm, "vllm", "4xh200", context=202_752).load.drafts == 0


def test_replicas_of_data_parallel_attention_add_up(glm: Served):
    plan = plan_for(glm, "vllm", "8xb200", profile="throughput")
    assert plan.tokens == 8 * plan.memory.tokens > 9e6


@pytest.mark.parametrize("profile", PROFILES)
def test_four_rtx_pro_6000_are_refused_with_figures(glm: Served, profile: str):
    with pytest.raises(LaunchError) as refusal:
        plan_for(glm, "vllm", "4xrtx-pro-6000", profile=profile)
    told = str(refusal.value)
    weights, share = re.search(r"weights take ([\d.]+) GB .*?, of ([\d.]+) GB", told).groups()
    assert float(weights) == pytest.approx(114.7, abs=0.1)
    assert float(share) == pytest.approx(0.87 * 102.6, abs=0.1)
    assert told.endswith("4xh200, 8xrtx-pro-6000, 4xb200 would do.")


def test_context_that_does_not_fit_is_refused_with_what_does(tmp_path: Path, glm: Served):
    longer = replace(glm, config=replace(glm.config, max_position_embeddings=1_000_000))
    with pytest.raises(LaunchError) as refusal:
        plan_for(longer, "vllm", "4xh200", context=400_000)
    told = str(refusal.value)
    offered = int(re.search(r"give --context (\d+) or less", told)[1])
    assert "61,464 bytes" in told
    assert 250_000 < offered < 400_000
    assert plan_for(longer, "vllm", "4xh200", context=offered).context == offered
    with pytest.raises(LaunchError):
        plan_for(longer, "vllm", "4xh200", context=offered + 64)
    for machine in re.search(r"; ([^;]+) would do", told)[1].split(", "):
        assert plan_for(longer, "vllm", machine, context=400_000).context == 400_000


@pytest.mark.parametrize("context", [0, -1, 202_753])
def test_context_beyond_the_model(glm: Served, context: int):
    with pytest.raises(LaunchError, match="1 to 202752 tokens"):
        plan_for(glm, "vllm", "8xh200", context=context)


def test_mtp_by_load_and_engine(tmp_path: Path):
    plain = hollow(tmp_path / "plain")
    packed = hollow(tmp_path / "packed", mtp="nvfp4")
    none = hollow(tmp_path / "none", mtp="drop")
    assert plan_for(plain, "sglang", "8xh200").load.drafts == 3
    assert plan_for(packed, "vllm", "8xh200").load.drafts == 3
    assert plan_for(packed, "sglang", "8xh200").load.drafts == 0
    assert plan_for(none, "vllm", "8xh200").load.drafts == 0
    assert plan_for(plain, "vllm", "8xh200", mtp=False).load.drafts == 0
    assert plan_for(plain, "vllm", "8xh200", profile="throughput", mtp=True).load.drafts == 3
    with pytest.raises(LaunchError, match=r"SGLang 0\.5\.23 reads an NVFP4 MTP layer"):
        plan_for(packed, "sglang", "8xh200", mtp=True)
    with pytest.raises(LaunchError, match="stores no MTP layer"):
        plan_for(none, "vllm", "8xh200", mtp=True)
    with pytest.raises(LaunchError, match="pipeline"):
        plan_for(plain, "vllm", "2x8xh200", mtp=True)


def test_tensor_parallelism_divides_the_shapes(tmp_path: Path):
    heads = hollow(tmp_path / "heads", num_attention_heads=12, num_key_value_heads=12)
    plan = plan_for(heads, "vllm", "8xh200")
    assert plan.parallel == Parallel(4)
    reason = next(choice.reason for choice in plan.choices if choice.name == "parallelism")
    assert "4 GPUs stay idle: 12 heads do not divide by 8" in reason
    blocks = hollow(tmp_path / "blocks", moe_intermediate_size=64)
    assert plan_for(blocks, "vllm", "8xh200").parallel == Parallel(4)  # 8 rows are half a block
    plain = hollow(tmp_path / "plain", nvfp4=False, moe_intermediate_size=64)
    assert plan_for(plain, "vllm", "8xh200").parallel == Parallel(8)


def test_odd_numbers_of_gpus_across_hosts(tmp_path: Path):
    small = hollow(tmp_path / "small")
    with pytest.raises(LaunchError, match="64 heads do not divide by 24"):
        plan_for(small, "sglang", "3x8xh200")
    assert plan_for(small, "vllm", "3x8xh200").parallel == Parallel(8, 1, 3)


def test_sparse_attention_of_sm120_needs_its_topk(tmp_path: Path):
    small = hollow(tmp_path / "small", index_topk=1024)
    with pytest.raises(LaunchError, match=r"index_topk 1024.* needs 2048: use --engine sglang"):
        plan_for(small, "vllm", "1xrtx-pro-6000")
    assert plan_for(small, "sglang", "1xrtx-pro-6000").kv == "fp8"
    assert plan_for(small, "vllm", "1xh200").kv == "fp8"


def test_cache_dtype_follows_the_models_sizes(tiny: Served):
    plan = plan_for(tiny, "vllm", "8xh200")
    assert (plan.kv, plan.parallel) == ("bf16", Parallel(4))
    assert plan.memory.bytes_per_token == 6 * (2 * (32 + 16) + 36)


def test_hopper_is_told_of_fp8(glm: Served):
    assert any("FP8 checkpoint" in w for w in plan_for(glm, "vllm", "8xh200").warnings)
    assert plan_for(glm, "vllm", "8xb200").warnings == ()


def test_index_pattern_saves_cache_and_warns(glm: Served):
    plan = plan_for(glm, "vllm", "8xrtx-pro-6000", pattern=KNOWN)
    assert plan.memory.bytes_per_token == 57_236
    assert any("trades quality" in warning for warning in plan.warnings)
    off = plan_for(glm, "vllm", "8xrtx-pro-6000")
    assert next(c.value for c in off.choices if c.name == "index pattern") == "off"


def test_old_gpus_are_refused(glm: Served):
    machine = replace(plan_for(glm, "vllm", "8xh200").hardware)
    old = replace(machine, gpu=replace(machine.gpu, architecture=80, title="A100"))
    request = replace(plan_for(glm, "vllm", "8xh200").request, hardware=old)
    with pytest.raises(LaunchError, match=r"A100 has compute capability 8\.0"):
        make_plan(glm, request)
