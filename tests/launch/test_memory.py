"""Memory figures against published start-up logs and the sizes of the real checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest

from fourge.launch.memory import GIB, Load, Parallel, lay_out, per_gpu, sglang_share
from fourge.launch.pattern import KNOWN, layer_kinds
from fourge.launch.served import Served, Weights
from fourge.models.footprint import cache_bytes_per_token
from launch_builders import hollow, on


def test_bytes_per_token_of_glm_5_1(glm: Served):
    assert cache_bytes_per_token(glm.config, "fp8", mtp=True) == 62_252
    assert cache_bytes_per_token(glm.config, "fp8") == 78 * (656 + 132)
    assert cache_bytes_per_token(glm.config, "nvfp4", mtp=True) == 79 * (352 + 132)
    assert cache_bytes_per_token(glm.config, "bf16", mtp=True) == 79 * (1152 + 132)
    kinds = layer_kinds(KNOWN, glm.raw, 78)
    shared = replace(glm.config, indexer_types=kinds)
    assert cache_bytes_per_token(shared, "fp8", mtp=True) == 57_236


def test_bytes_per_token_without_an_indexer(tmp_path: Path, glm: Served):
    dense = replace(glm.config, model_type="deepseek_v3", indexer_types=(), index_head_dim=0)
    assert cache_bytes_per_token(dense, "fp8") == 78 * (512 + 64)
    assert cache_bytes_per_token(dense, "bf16") == 78 * 2 * (512 + 64)


def test_published_log_of_eight_rtx_pro_6000(glm: Served):
    """rtx6kpro, 2026-05-02: share 0.89, chunks of 8192, 64 sequences, 3 drafts, NVFP4 MTP layer,
    graphs of 8 without a reserve for them: "Available KV cache memory" 25.09 GiB, 432,832 tokens.
    """
    assert pytest.approx(432_832, rel=3e-4) == 25.09 * GIB / 62_252
    machine = on("8xrtx-pro-6000", vllm=0.89)
    packed = Weights(glm.mtp_weights.experts * 9 // 32, *_rest(glm.mtp_weights))
    published = replace(glm, mtp_weights=packed)
    memory = lay_out(published, machine, "vllm", Parallel(8), Load(64, 3, 8192), kv="fp8")
    memory = replace(memory, graphs=0)
    assert memory.bytes_per_token == 62_252
    assert memory.cache / GIB == pytest.approx(25.09, rel=0.03)
    assert memory.tokens == pytest.approx(432_832, rel=0.03)


def _rest(weights: Weights) -> tuple[int, int]:
    return weights.sharded, weights.replicated


def test_weights_of_glm_5_1(glm: Served):
    assert glm.weights.experts == 75 * 256 * 3 * (6144 * 2048 * 9 // 16 + 8)
    assert glm.weights.total / 1e9 == pytest.approx(446, abs=0.5)
    assert glm.mtp_weights.experts == 256 * 3 * 6144 * 2048 * 2
    # Norms, routers, indexers and latents' down projections lie on every GPU.
    assert per_gpu(glm.weights, Parallel(8)) / 1e9 == pytest.approx(59.4, abs=0.1)
    assert per_gpu(glm.weights, Parallel(1, 8)) / 1e9 == pytest.approx(51 + 38.3, abs=0.1)
    assert (glm.experts, glm.mtp_experts) == ("nvfp4", "bf16")


@pytest.mark.parametrize(
    ("machine", "parallel", "load", "least", "most"),
    [
        ("8xrtx-pro-6000", Parallel(8), Load(8, 3, 8192), 300e3, 430e3),
        ("4xh200", Parallel(4), Load(16, 0, 8192), 200e3, 290e3),
        ("4xb200", Parallel(4), Load(32, 3, 16384), 0.65e6, 0.9e6),
        ("8xh200", Parallel(8), Load(128, 0, 8192), 1.1e6, 1.3e6),
    ],
)
def test_tokens_by_machine(
    glm: Served, machine: str, parallel: Parallel, load: Load, least: float, most: float
):
    memory = lay_out(glm, on(machine), "vllm", parallel, load, kv="fp8")
    assert least < memory.tokens < most


def test_four_rtx_pro_6000_hold_no_token(glm: Served):
    memory = lay_out(glm, on("4xrtx-pro-6000"), "vllm", Parallel(4), Load(1, 0, 2048), kv="fp8")
    assert memory.tokens == 0
    assert memory.cache < -20 * GIB


def test_pipeline_divides_weights_and_cache(glm: Served):
    whole = lay_out(glm, on("2x8xh200"), "vllm", Parallel(8), Load(8, 0, 8192), kv="fp8")
    half = lay_out(glm, on("2x8xh200"), "vllm", Parallel(8, 1, 2), Load(8, 0, 8192), kv="fp8")
    assert half.weights == pytest.approx(whole.weights / 2, rel=1e-6)
    assert half.bytes_per_token * 2 == whole.bytes_per_token == 61_464


def test_share_that_sglang_chooses():
    """memory_hook.py of 0.5.23: 10 GiB at least stay free above 60 GiB."""
    gpu = on("8xh200").gpu
    memory = gpu.memory / (1 << 20)
    plain = sglang_share(gpu, Parallel(8), Load(64, 0, 2048))
    assert plain == round((memory - 10 * 1024) / memory, 3)
    reserve = 512 + 1.5 * 16384 + 2048 + 2 * 64 + 1536
    large = sglang_share(gpu, Parallel(16), Load(64, 0, 16384))
    assert large == round((memory - reserve) / memory, 3)


def test_bf16_and_packed_mtp(tmp_path: Path):
    plain = hollow(tmp_path / "plain")
    packed = hollow(tmp_path / "packed", mtp="nvfp4")
    dropped = hollow(tmp_path / "dropped", mtp="drop")
    assert (plain.mtp_experts, packed.mtp_experts) == ("bf16", "nvfp4")
    assert packed.mtp_weights.experts < 0.29 * plain.mtp_weights.experts
    assert not dropped.has_mtp
    assert plain.weights == packed.weights == dropped.weights
