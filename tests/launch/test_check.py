"""Reviews of published and of made-up commands: every finding, and corrected commands that pass."""

import json
from pathlib import Path

import pytest

from fourge.launch.catalogue import load
from fourge.launch.check import Review, review
from fourge.launch.command import read
from fourge.launch.pattern import KNOWN
from fourge.launch.rewrite import text
from fourge.launch.rules import VERDICTS, rules
from launch_builders import PUBLISHED


def reviewed(command: str, family: int | None = None) -> Review:
    (found,) = read(command)
    return review(found, load(found.engine), family)


def verdicts(found: Review) -> dict[str, str]:
    """Name -> verdict of everything that is not plainly kept."""
    return {one.name: one.verdict for one in found.findings if one.verdict != "kept"}


def reasons(found: Review, name: str) -> str:
    return " | ".join(one.reason for one in found.findings if one.name == name)


def option(command: str, flag: str, family: int | None = None) -> tuple[str, str]:
    """Verdict on one option, and what becomes of it."""
    found = reviewed(command, family)
    (one,) = [one for one in found.findings if one.name == flag]
    return one.verdict, " ".join(one.becomes) if one.becomes is not None else "as it is"


def is_clean(found: Review, family: int | None = None) -> bool:
    again = reviewed(text(found.corrected), family)
    return not again.needs_change and text(again.corrected) == text(found.corrected)


# -- the model card -------------------------------------------------------------------------------


def test_card_of_vllm():
    found = reviewed((PUBLISHED / "card-vllm.sh").read_text())
    assert verdicts(found) == {
        "OMP_NUM_THREADS": "redundant",
        "NCCL_GRAPH_FILE": "dangerous",
        "VLLM_ENABLE_PCIE_ALLREDUCE": "fork-only",
        "VLLM_USE_B12X_SPARSE_INDEXER": "fork-only",
        "VLLM_B12X_MLA_SPEC_SERIAL_DECODE": "fork-only",
        "VLLM_MTP_RETURN_NORMALIZED_HIDDEN": "fork-only",
        "VLLM_CACHE_DIR": "ignored",
        "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "dangerous",
        "SPEC_CONFIG": "redundant",
        "HF_OVERRIDES": "redundant",
        "image": "fork-only",
        "--privileged": "dangerous",
        "-v": "redundant",
        "--trust-remote-code": "dangerous",
        "--host": "dangerous",
        "--pipeline-parallel-size": "redundant",
        "--enable-chunked-prefill": "redundant",
        "--enable-prefix-caching": "redundant",
        "--async-scheduling": "redundant",
        "--mm-processor-cache-gb": "ignored",
        "--mm-encoder-tp-mode": "ignored",
        "--attention-backend": "fork-only",
        "--speculative-config": "fork-only",
    }
    assert "not part of the model's training" in reasons(found, "--hf-overrides")
    assert "MTP layer" in reasons(found, "--hf-overrides")
    assert "fastsafetensors" in reasons(found, "--load-format")
    assert reasons(found, "--max-cudagraph-capture-size") == ""  # 256 = 64 x (3 + 1)
    assert any("--max-model-len" in sentence for sentence in found.advice)
    assert any("--chat-template-content-format" in sentence for sentence in found.advice)


def test_card_of_vllm_corrected():
    found = reviewed((PUBLISHED / "card-vllm.sh").read_text())
    corrected = found.corrected
    words = {argument.flag: argument.values for argument in corrected.arguments}
    draft = json.loads(words["--speculative-config"][0])
    assert draft["rejection_sample_method"] == "standard"
    assert draft["use_local_argmax_reduction"] is True  # greedy drafts: it may stay
    assert words["--host"] == ("127.0.0.1",)
    assert "--attention-backend" not in words
    assert corrected.container is not None
    assert corrected.container.image == "vllm/vllm-openai:v0.33.0"
    assert not any("nccl_graph" in (value or "") for _, value in corrected.container.options)
    written = text(corrected)
    assert "-v ~/.cache/huggingface:/root/.cache/huggingface" in written  # the shell must see ~
    assert "--entrypoint vllm" in written
    assert is_clean(found)


def test_card_of_sglang():
    found = reviewed((PUBLISHED / "card-sglang.sh").read_text())
    assert verdicts(found) == {
        "OMP_NUM_THREADS": "redundant",
        "SGLANG_ENABLE_SPEC_V2": "ignored",
        "NVIDIA_VISIBLE_DEVICES": "ignored",
        "--disable-piecewise-cuda-graph": "renamed",
        "--trust-remote-code": "dangerous",
        "--enable-pcie-oneshot-allreduce": "fork-only",
        "--page-size": "redundant",
        "--nsa-prefill-backend": "renamed",
        "--nsa-decode-backend": "renamed",
        "--attention-backend": "renamed",
        "--moe-runner-backend": "invalid",
        "--fp4-gemm-backend": "invalid",
        "--cuda-graph-max-bs": "renamed",
        "--json-model-override-args": "ignored",
        "--host": "dangerous",
    }
    assert "off by one" in reasons(found, "NVIDIA_VISIBLE_DEVICES")
    assert "--dsa-prefill-backend" in reasons(found, "--nsa-prefill-backend")
    assert "indexer_types" in reasons(found, "--json-model-override-args")
    assert "--cuda-graph-max-bs-prefill" in reasons(found, "--cuda-graph-max-bs")
    assert any("MTP is off" in sentence for sentence in found.advice)


def test_card_of_sglang_corrected():
    found = reviewed((PUBLISHED / "card-sglang.sh").read_text())
    words = {argument.flag: argument.values for argument in found.corrected.arguments}
    keys = json.loads(words["--json-model-override-args"][0])
    assert keys["index_topk_pattern"] == KNOWN
    assert keys["indexer_types"].count("shared") == 38
    assert words["--cuda-graph-max-bs-decode"] == ("8",)
    assert words["--disable-prefill-cuda-graph"] == ()
    assert dict(found.corrected.environment) == {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert is_clean(found)


# -- other published commands ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in PUBLISHED.iterdir()))
def test_corrected_commands_pass(name: str):
    assert is_clean(reviewed((PUBLISHED / name).read_text()))


def test_recipe_needs_no_change():
    found = reviewed((PUBLISHED / "recipe-vllm.sh").read_text())
    assert (verdicts(found), found.needs_change) == ({}, False)


def test_readme_of_sglang_only_has_a_dead_variable():
    found = reviewed((PUBLISHED / "readme-sglang.sh").read_text())
    assert (verdicts(found), found.needs_change) == ({"SGLANG_ENABLE_SPEC_V2": "ignored"}, False)


def test_benchmark_of_sglang():
    found = reviewed((PUBLISHED / "benchmark-sglang.sh").read_text())
    assert verdicts(found) == {
        "SGL_ENABLE_JIT_DEEPGEMM": "ignored",
        "--host": "dangerous",
        "--trust-remote-code": "dangerous",
        "--data-parallel-size": "redundant",
        "--expert-parallel-size": "redundant",
        "--attention-backend": "renamed",
        "--nsa-decode-backend": "renamed",
        "--nsa-prefill-backend": "renamed",
        "--cuda-graph-max-bs": "renamed",
        "--enable-flashinfer-allreduce-fusion": "renamed",
    }
    assert "--dsa-decode-backend trtllm" in text(found.corrected)
    assert "--tensor-parallel-size 8" in text(found.corrected)


def test_dp_attention_of_sglang_becomes_attn_dp_size():
    found = reviewed((PUBLISHED / "dp-attention-sglang.sh").read_text())
    assert verdicts(found)["--tp"] == "invalid"
    assert verdicts(found)["--enable-dp-attention"] == "renamed"
    written = text(found.corrected)
    assert "--tp-size 8" in written
    assert "--attn-dp-size 8" in written
    assert "--dp-size" not in written.replace("--attn-dp-size", "")
    assert "'<MASTER_IP>:5000'" in written


def test_compose_keeps_what_is_not_the_engines():
    found = reviewed((PUBLISHED / "compose-vllm.yaml").read_text())
    assert verdicts(found) == {
        "VLLM_ATTENTION_BACKEND": "ignored",
        "--privileged": "dangerous",
        "--enable-auto-tool-choice": "invalid",
        "--swap-space": "invalid",
        "--hf-overrides": "invalid",
    }
    written = text(found.corrected)
    assert "nginx" in written
    assert "8000:8000" in written
    assert "privileged" not in written


# -- made up --------------------------------------------------------------------------------------

VLLM = "vllm serve m --max-model-len 4096 "
SGLANG = "python -m sglang.launch_server --model-path m "


@pytest.mark.parametrize(
    ("words", "flag", "verdict", "becomes"),
    [
        ("--max-modl-len 4", "--max-modl-len", "invalid", ""),
        ("--max-num-seq 4", "--max-num-seq", "invalid", "--max-num-seqs 4"),
        ("--tensor-parallel-size eight", "--tensor-parallel-size", "invalid", ""),
        ("--tensor-parallel-size", "--tensor-parallel-size", "invalid", ""),
        ("--tensor-parallel-size 4 8", "--tensor-parallel-size", "invalid", ""),
        ("--tensor_parallel_size 4", "--tensor_parallel_size", "kept", "as it is"),
        ("-tp 4", "-tp", "kept", "as it is"),
        ("-ep", "-ep", "kept", "as it is"),
        ("--disable-expert-parallel", "--disable-expert-parallel", "redundant", ""),
        ("--no-async-scheduling", "--no-async-scheduling", "kept", "as it is"),
        ("--tensor-parallel-size=4", "--tensor-parallel-size", "kept", "as it is"),
        ("--gpu-memory-utilization 0.92", "--gpu-memory-utilization", "redundant", ""),
        ("--kv-cache-dtype fp9", "--kv-cache-dtype", "invalid", ""),
        ("--kv-cache-dtype nvfp4", "--kv-cache-dtype", "dangerous", "--kv-cache-dtype fp8"),
        ("--load-format bogus", "--load-format", "invalid", ""),
        ("--moe-backend bogus", "--moe-backend", "invalid", ""),
        ("--tool-call-parser glm99", "--tool-call-parser", "invalid", ""),
        ("--attention-backend B12X", "--attention-backend", "invalid", ""),
        ("--attention-backend FLASHMLA_SPARSE", "--attention-backend", "kept", "as it is"),
        ("--enforce-eager true", "--enforce-eager", "invalid", "--enforce-eager"),
        ("--no-enable-prefix-caching", "--no-enable-prefix-caching", "kept", "as it is"),
        ("--max-model-len 8k --max-model-len auto", "--max-model-len", None, None),
        ("--hf-overrides '{broken'", "--hf-overrides", "invalid", ""),
        ("--cuda-graph-sizes 1 2", "--cuda-graph-sizes", "renamed",
         "--cudagraph-capture-sizes 1 2"),
    ],
)  # fmt: skip
def test_options_of_vllm(words: str, flag: str, verdict: str | None, becomes: str | None):
    if verdict is None:
        found = reviewed(VLLM + words)
        assert [one.verdict for one in found.findings] == ["redundant", "redundant", "kept"]
        return
    assert option(VLLM + words, flag) == (verdict, becomes)
    assert is_clean(reviewed(VLLM + words))


@pytest.mark.parametrize(
    ("draft", "verdict", "fixed"),
    [
        ('{"method":"mtp","rejection_sample_method":"fly"}', "dangerous", "standard"),
        ('{"method":"mtp","rejection_sample_method":"synthetic"}', "dangerous", "standard"),
        ('{"method":"mtp","rejection_sample_method":"block"}', "kept", "block"),
        ('{"method":"mtp","rejection_sample_method":"nonsense"}', "invalid", None),
        ('{"method":"mtp","temprature":1}', "invalid", None),
        ('{"method":"mtp","synthetic_acceptance_length":3}', "dangerous", None),
    ],
)
def test_keys_of_the_speculative_config(draft: str, verdict: str, fixed: str | None):
    found = reviewed(f"{VLLM} --speculative-config '{draft}'")
    (one,) = [one for one in found.findings if one.name == "--speculative-config"]
    assert one.verdict == verdict
    kept = json.loads(one.becomes[1]) if one.becomes else json.loads(draft)
    assert kept.get("rejection_sample_method") == fixed
    assert kept["method"] == "mtp"
    assert is_clean(found)


def test_dotted_keys():
    words = "--speculative-config.method mtp --speculative-config.rejection_sample_method fly"
    flag = "--speculative-config.rejection_sample_method"
    assert option(VLLM + words, flag) == ("dangerous", f"{flag} standard")
    assert (
        option(VLLM + "--speculative-config.methd x", "--speculative-config.methd")[0] == "invalid"
    )


def test_local_argmax_needs_greedy_drafts():
    base = '{"method":"mtp","num_speculative_tokens":3,"use_local_argmax_reduction":true'
    for extra in ('"draft_sample_method":"probabilistic"', '"enable_adaptive_verification":true'):
        words = f"{VLLM} --speculative-config '{base},{extra}}}'"
        verdict, becomes = option(words, "--speculative-config")
        assert verdict == "invalid"
        assert "use_local_argmax_reduction" not in becomes
    assert option(f"{VLLM} --speculative-config '{base}}}'", "--speculative-config")[0] == "kept"


def test_asynchronous_scheduling_in_a_pipeline_is_an_error():
    words = VLLM + "--async-scheduling --pipeline-parallel-size 2"
    assert option(words, "--async-scheduling") == ("invalid", "")


def test_tool_choice_needs_its_parser():
    words = VLLM + "--enable-auto-tool-choice"
    fixed = "--enable-auto-tool-choice --tool-call-parser glm47"
    assert option(words, "--enable-auto-tool-choice") == ("invalid", fixed)


def test_graphs_smaller_than_the_batches_are_told_of():
    words = VLLM + "--max-num-seqs 64 --speculative-config.num_speculative_tokens 3"
    words += """ --speculative-config '{"method":"mtp"}' --max-cudagraph-capture-size """
    flag = "--max-cudagraph-capture-size"
    assert "64 sequences x 4 tokens" in reasons(reviewed(words + "255"), flag)
    assert reasons(reviewed(words + "256"), flag) == ""


def test_full_memory_without_a_reserve_for_graphs():
    words = "export VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=0\n" + VLLM
    words += "--gpu-memory-utilization 0.95"
    assert option(words, "--gpu-memory-utilization") == (
        "dangerous",
        "--gpu-memory-utilization 0.9",
    )


@pytest.mark.parametrize(
    ("command", "flag", "family", "verdict"),
    [
        (VLLM + "--moe-backend flashinfer_trtllm", "--moe-backend", 120, "invalid"),
        (VLLM + "--moe-backend flashinfer_trtllm", "--moe-backend", 100, "kept"),
        (VLLM + "--moe-backend flashinfer_trtllm", "--moe-backend", None, "kept"),
        (VLLM + "--moe-backend b12x", "--moe-backend", 90, "invalid"),
        (VLLM + "--moe-backend b12x", "--moe-backend", 120, "kept"),
        (SGLANG + "--moe-runner-backend flashinfer_trtllm", "--moe-runner-backend", 90, "invalid"),
    ],
)
def test_backends_by_architecture(command: str, flag: str, family: int | None, verdict: str):
    assert option(command, flag, family)[0] == verdict


def test_architecture_is_read_from_the_environment():
    command = "CUTE_DSL_ARCH=sm_120a " + VLLM + "--moe-backend flashinfer_trtllm"
    assert option(command, "--moe-backend")[0] == "invalid"


@pytest.mark.parametrize(
    ("words", "flag", "verdict", "becomes"),
    [
        ("--tp 8", "--tp", "invalid", "--tp-size 8"),
        ("--cuda-graph-ma 8", "--cuda-graph-ma", "invalid", ""),
        ("--page-size 1", "--page-size", "ignored", ""),
        ("--tool-call-parser glm45", "--tool-call-parser", "renamed", "--tool-call-parser glm"),
        ("--dsa-decode-backend triton", "--dsa-decode-backend", "invalid", ""),
        ("--speculative-accept-threshold-acc 0.9", "--speculative-accept-threshold-acc",
         "dangerous", ""),
        ("--speculative-accept-threshold-acc 1.0", "--speculative-accept-threshold-acc",
         "redundant", ""),
        ("--disable-cuda-graph", "--disable-cuda-graph", "renamed",
         "--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled"),
        ("--preferred-sampling-params {x", "--preferred-sampling-params", "invalid", ""),
        ("--json-model-override-args {x", "--json-model-override-args", "invalid", ""),
        ("--speculative-eagle-topk 1", "--speculative-eagle-topk", "invalid", ""),
        ("--nnodes 2", "--nnodes", "invalid", "as it is"),
        ("--attn-dp-size 8 --dp-size 8", "--dp-size", "invalid", ""),
        ("--dcp-size 2 --speculative-num-steps 3 --speculative-eagle-topk 4",
         "--speculative-eagle-topk", "invalid", "--speculative-eagle-topk 1"),
        ("--dsa-prefill-backend tilelang --kv-cache-dtype fp8_e4m3", "--dsa-prefill-backend",
         "invalid", ""),
    ],
)  # fmt: skip
def test_options_of_sglang(words: str, flag: str, verdict: str, becomes: str):
    assert option(SGLANG + words, flag) == (verdict, becomes)


def test_two_batch_overlap_and_shared_indices():
    pattern = json.dumps({"index_topk_pattern": KNOWN})
    words = f"{SGLANG} --enable-two-batch-overlap --json-model-override-args '{pattern}'"
    assert option(words, "--enable-two-batch-overlap") == ("invalid", "")
    assert option(SGLANG + "--enable-two-batch-overlap", "--enable-two-batch-overlap")[0] == "kept"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_index_patterns_that_cannot_be_used(engine: str):
    base, flag = {
        "vllm": (VLLM, "--hf-overrides"),
        "sglang": (SGLANG, "--json-model-override-args"),
    }[engine]
    for bad in (KNOWN[:-1], "S" + KNOWN[1:], KNOWN + "S"):
        words = f"{base}{flag} '{json.dumps({'index_topk_pattern': bad, 'rope_theta': 1})}'"
        assert option(words, flag) == ("invalid", f'{flag} {{"rope_theta":1}}')


def test_index_pattern_on_a_model_with_its_own(tmp_path: Path):
    words = f"""--hf-overrides '{json.dumps({"index_topk_pattern": KNOWN})}'"""
    assert option(f"vllm serve zai-org/GLM-5.2 {words}", "--hf-overrides") == ("invalid", "")
    assert option(f"vllm serve zai-org/GLM-5.1 {words}", "--hf-overrides")[0] == "kept"
    types = {"num_hidden_layers": 2, "indexer_types": ["full", "shared"]}
    (tmp_path / "config.json").write_text(json.dumps(types))
    assert option(f"vllm serve {tmp_path} {words}", "--hf-overrides") == ("invalid", "")


def test_indexer_types_alone_do_nothing_in_vllm():
    types = {"indexer_types": ["full" if c == "F" else "shared" for c in KNOWN]}
    verdict, becomes = option(f"{VLLM} --hf-overrides '{json.dumps(types)}'", "--hf-overrides")
    assert verdict == "ignored"
    assert KNOWN in becomes


def test_index_topk_of_sm120(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"index_topk": 64}))
    found = reviewed(f"vllm serve {tmp_path} --max-model-len 4096", family=120)
    assert found.needs_change
    assert "index_topk is 64" in reasons(found, "model")
    assert not reviewed(f"vllm serve {tmp_path} --max-model-len 4096", family=90).needs_change


@pytest.mark.parametrize(
    ("command", "verdict"),
    [
        (VLLM + "--host 0.0.0.0", "dangerous"),
        (VLLM + "--host 0.0.0.0 --api-key k", "kept"),
        ("VLLM_API_KEY=k " + VLLM + "--host 0.0.0.0", "kept"),
        (VLLM + "--host 127.0.0.1", "kept"),
        (SGLANG + "--host ::", "dangerous"),
        ("docker run --network host vllm/vllm-openai m --host 0.0.0.0", "dangerous"),
        ("docker run -p 1:1 vllm/vllm-openai m --host 0.0.0.0", "kept"),
    ],
)
def test_open_servers(command: str, verdict: str):
    assert option(command, "--host")[0] == verdict


def test_missing_model():
    found = reviewed("python -m sglang.launch_server --tp-size 8")
    assert reasons(found, "model") == "the command names no model"
    assert found.needs_change


def test_strays_and_broken_lines():
    found = reviewed("python -m sglang.launch_server m \\ \n --tp-size 8")
    assert verdicts(found) == {"line 1": "invalid", "m": "invalid", "model": "invalid"}


def test_variables_that_nobody_reads():
    found = reviewed("VLLM_NO_SUCH=1 NCCL_DEBUG=INFO VLLM_LOGGING_LEVEL=INFO " + VLLM)
    assert verdicts(found) == {"VLLM_NO_SUCH": "ignored"}
    assert verdicts(reviewed("VLLM_SERVER_DEV_MODE=1 " + VLLM)) == {
        "VLLM_SERVER_DEV_MODE": "dangerous"
    }


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_rules_are_well_formed(engine: str):
    catalogue = load(engine)
    for rule in rules(engine):
        assert rule.verdict in VERDICTS
        assert rule.kind in ("option", "variable", "container")
        assert rule.verdict != "renamed" or rule.becomes is not None
        for word in rule.becomes or ():
            if word.startswith("--") and rule.kind == "option":
                assert catalogue.find(word) is not None, word
