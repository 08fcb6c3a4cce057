"""Generated commands: every option is in the engine's catalogue, and every form says the same."""

import json
import shlex

import pytest
import yaml

from fourge.launch.catalogue import load
from fourge.launch.check import review
from fourge.launch.command import read
from fourge.launch.options import Endpoint
from fourge.launch.pattern import KNOWN
from fourge.launch.plan import ENGINES, PROFILES, Plan
from fourge.launch.releases import RELEASES
from fourge.launch.render import document, make_launch, render
from fourge.launch.rewrite import words
from fourge.launch.served import Served
from launch_builders import ENDPOINT, MACHINES, hollow, plan_for


def options(plan: Plan, endpoint: Endpoint = ENDPOINT) -> dict[str, str | None]:
    """Flag -> value of the first host's command."""
    command = make_launch(plan, endpoint, [], contained=False).commands[0]
    return {option.flag: option.value for option in command.options}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_command_passes_its_own_check(glm: Served, engine: str, machine: str):
    for profile in PROFILES:
        for pattern in (None, KNOWN):
            plan = plan_for(glm, engine, machine, profile=profile, pattern=pattern)
            made = make_launch(plan, ENDPOINT, [], contained=False)
            for command in read(render(made, "shell")):
                found = review(command, load(engine), plan.family)
                wrong = [one for one in found.findings if one.verdict != "kept"]
                assert wrong == []


def test_vllm_on_eight_rtx_pro_6000(glm: Served):
    assert options(plan_for(glm, "vllm", "8xrtx-pro-6000")) == {
        "--served-model-name": "GLM-5.1",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--tensor-parallel-size": "8",
        "--load-format": "fastsafetensors",
        "--gpu-memory-utilization": "0.87",
        "--max-model-len": "202752",
        "--max-num-seqs": "8",
        "--max-num-batched-tokens": "8192",
        "--max-cudagraph-capture-size": "32",
        "--kv-cache-dtype": "fp8",
        "--moe-backend": "flashinfer_cutlass",
        "--speculative-config": '{"method":"mtp","num_speculative_tokens":3,'
        '"moe_backend":"triton"}',
        "--tool-call-parser": "glm47",
        "--enable-auto-tool-choice": None,
        "--reasoning-parser": "glm45",
        "--chat-template-content-format": "string",
        "--override-generation-config": '{"temperature":1.0,"top_p":0.95}',
    }


def test_sglang_on_eight_rtx_pro_6000(glm: Served):
    found = options(plan_for(glm, "sglang", "8xrtx-pro-6000"))
    assert (
        found.items()
        >= {
            "--tp-size": "8",
            "--context-length": "202752",
            "--mem-fraction-static": "0.82",
            "--max-running-requests": "8",
            "--cuda-graph-max-bs-decode": "8",
            "--chunked-prefill-size": "4096",
            "--kv-cache-dtype": "fp8_e4m3",
            "--quantization": "modelopt_fp4",
            "--disable-shared-experts-fusion": None,
            "--disable-prefill-cuda-graph": None,
            "--speculative-algorithm": "NEXTN",
            "--speculative-num-steps": "3",
            "--speculative-eagle-topk": "1",
            "--speculative-num-draft-tokens": "4",
            "--tool-call-parser": "glm47",
            "--reasoning-parser": "glm45",
            "--preferred-sampling-params": '{"temperature":1.0,"top_p":0.95}',
            "--enable-metrics": None,
        }.items()
    )
    assert "--moe-runner-backend" not in found
    assert not {"--trust-remote-code", "--page-size", "--attention-backend"} & found.keys()


@pytest.mark.parametrize(
    ("machine", "vllm_backend", "sglang_backend"),
    [
        ("8xrtx-pro-6000", "flashinfer_cutlass", None),
        ("8xb200", None, None),
        ("8xh200", "marlin", "marlin"),
    ],
)
def test_moe_backends_exist_on_the_architecture(
    glm: Served, machine: str, vllm_backend: str | None, sglang_backend: str | None
):
    assert options(plan_for(glm, "vllm", machine)).get("--moe-backend") == vllm_backend
    found = options(plan_for(glm, "sglang", machine))
    assert found.get("--moe-runner-backend") == sglang_backend


def test_throughput_on_b200_spreads_experts(glm: Served):
    vllm = options(plan_for(glm, "vllm", "8xb200", profile="throughput"))
    assert vllm["--data-parallel-size"] == "8"
    assert vllm["--enable-expert-parallel"] is None
    assert "--tensor-parallel-size" not in vllm
    sglang = options(plan_for(glm, "sglang", "8xb200", profile="throughput"))
    assert (sglang["--tp-size"], sglang["--attn-dp-size"]) == ("8", "8")
    assert sglang["--moe-a2a-backend"] == "flashinfer"
    assert sglang["--max-running-requests"] == "1024"


def test_graphs_cover_every_sequence_with_its_drafts(glm: Served):
    for machine in MACHINES:
        plan = plan_for(glm, "vllm", machine)
        found = options(plan)
        captured = int(found["--max-cudagraph-capture-size"] or 0)
        assert captured >= int(found["--max-num-seqs"] or 0) * (plan.load.drafts + 1)


def test_index_pattern_is_written_for_each_engine(glm: Served):
    for engine, flag in (("vllm", "--hf-overrides"), ("sglang", "--json-model-override-args")):
        keys = json.loads(options(plan_for(glm, engine, "8xh200", pattern=KNOWN + "F"))[flag])
        assert keys["index_topk_pattern"] == KNOWN
        assert keys["indexer_types"].count("shared") == 38
        assert flag not in options(plan_for(glm, engine, "8xh200"))


def test_packed_mtp_layer_keeps_the_targets_kernels(tmp_path):
    packed = hollow(tmp_path / "packed", mtp="nvfp4")
    draft = json.loads(options(plan_for(packed, "vllm", "8xh200"))["--speculative-config"] or "")
    assert draft == {"method": "mtp", "num_speculative_tokens": 3}


def test_unquantized_checkpoints_get_no_nvfp4_options(tiny: Served):
    found = options(plan_for(tiny, "sglang", "1xh200"))
    assert not {"--quantization", "--moe-runner-backend", "--kv-cache-dtype"} & found.keys()
    assert json.loads(found["--preferred-sampling-params"] or "") == tiny.sampling
    # vLLM reads the generation_config.json that this one has.
    assert "--override-generation-config" not in options(plan_for(tiny, "vllm", "1xh200"))


def test_api_key(glm: Served):
    endpoint = Endpoint("GLM", "0.0.0.0", 80, "secret")
    vllm = make_launch(plan_for(glm, "vllm", "8xh200"), endpoint, [], contained=False)
    assert "secret" not in vllm.commands[0].words
    assert {one.name: one.value for one in vllm.commands[0].environment}["VLLM_API_KEY"] == "secret"
    assert options(plan_for(glm, "sglang", "8xh200"), endpoint)["--api-key"] == "secret"


# -- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["shell", "docker", "compose"])
def test_forms_read_back_as_the_same_command(glm: Served, engine: str, form: str):
    plan = plan_for(glm, engine, "8xrtx-pro-6000", pattern=KNOWN)
    made = make_launch(plan, ENDPOINT, [], contained=form != "shell")
    (command,) = read(render(made, form))
    assert words(command) == made.commands[0].words
    environment = dict(command.environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert environment["CUTE_DSL_ARCH"] == "sm_120a"
    if form == "shell":
        assert str(plan.served.folder.resolve()) in words(command)
    else:
        assert command.container is not None
        assert command.container.image == RELEASES[engine].image
        assert environment["XDG_CACHE_HOME"] == "/cache"
        assert "/model" in words(command)
        assert ("--privileged", None) not in command.container.options


def test_compose_file(glm: Served):
    made = make_launch(plan_for(glm, "vllm", "8xh200"), ENDPOINT, [], contained=True)
    service = yaml.safe_load(render(made, "compose"))["services"]["vllm"]
    assert service["volumes"][0] == f"{glm.folder.resolve()}:/model:ro"
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "all"
    assert service["ipc"] == "host"


def test_json_document(glm: Served):
    plan = plan_for(glm, "vllm", "8xrtx-pro-6000")
    made = json.loads(json.dumps(document(make_launch(plan, ENDPOINT, [], contained=False))))
    assert (made["engine"], made["engine_version"]) == ("vllm", "0.33.0")
    assert made["memory"]["bytes_per_token"] == 62_252
    assert made["memory"]["tokens"] == made["tokens"] == plan.tokens
    assert made["commands"][0]["argv"][:2] == ["vllm", "serve"]
    assert all(option["reason"] for option in made["commands"][0]["options"])
    assert all(choice["reason"] for choice in made["choices"])


def test_explanation_shows_the_table_and_every_option(glm: Served):
    plan = plan_for(glm, "vllm", "8xrtx-pro-6000")
    made = make_launch(plan, ENDPOINT, [], contained=False)
    text = render(made, "explain")
    for line in ("weights", "MTP layer", "activations", "CUDA graphs", "KV cache"):
        assert f"\n  {line}" in text
    assert "62,252 bytes per token" in text
    assert f"{plan.tokens:,} tokens fit" in text
    for option in made.commands[0].options:
        assert any(
            line.split()[:1] == [option.flag] and line.endswith(option.reason)
            for line in text.splitlines()
        )
    for part in ("attention", "MoE", "sampling", "caches"):
        assert any(line.split()[:1] == [part] for line in text.splitlines())


# -- several hosts --------------------------------------------------------------------------------


def test_vllm_on_two_hosts_uses_ray(glm: Served):
    plan = plan_for(glm, "vllm", "2x8xh200")
    head, worker = make_launch(plan, ENDPOINT, ["a", "b"], contained=False).commands
    assert head.setup == (
        ("ray", "start", "--head", "--port=6379", "--node-ip-address=a", "--num-gpus=8"),
    )
    assert worker.setup == (
        ("ray", "start", "--address=a:6379", "--node-ip-address=b", "--num-gpus=8", "--block"),
    )
    assert worker.program == ()
    found = {option.flag: option.value for option in head.options}
    assert (found["--pipeline-parallel-size"], found["--distributed-executor-backend"]) == (
        "2",
        "ray",
    )
    assert found["--tensor-parallel-size"] == "8"
    assert "--load-format" not in found
    hosts = [{one.name: one.value for one in c.environment} for c in (head, worker)]
    assert [host["VLLM_HOST_IP"] for host in hosts] == ["a", "b"]


def test_idle_gpus_of_each_host_are_left_out(tmp_path):
    heads = hollow(tmp_path / "heads", num_attention_heads=12, num_key_value_heads=12)
    plan = plan_for(heads, "vllm", "2x8xh200")
    assert (plan.parallel.tensor, plan.parallel.pipeline, plan.gpus_per_host) == (4, 2, 4)
    (choice,) = [one for one in plan.choices if one.name == "parallelism"]
    assert "8 GPUs stay idle: 12 heads do not divide by 8" in choice.reason
    head, worker = make_launch(plan, ENDPOINT, [], contained=False).commands
    assert "--num-gpus=4" in head.setup[0]
    for command in (head, worker):
        environment = {one.name: one.value for one in command.environment}
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_sglang_on_two_hosts_runs_everywhere(glm: Served):
    plan = plan_for(glm, "sglang", "2x8xh200")
    commands = make_launch(plan, ENDPOINT, ["a", "b"], contained=False).commands
    for rank, command in enumerate(commands):
        found = {option.flag: option.value for option in command.options}
        assert (found["--nnodes"], found["--node-rank"]) == ("2", str(rank))
        assert found["--dist-init-addr"] == "a:20000"
        assert found["--tp-size"] == "16"


def test_text_for_two_hosts_says_which(glm: Served):
    made = make_launch(plan_for(glm, "vllm", "2x8xh200"), ENDPOINT, [], contained=False)
    first, second = render(made, "shell").split("\n\n")
    assert first.startswith("# on host-0\n")
    assert "vllm serve" in first
    assert second.startswith("# on host-1\n")
    assert "vllm serve" not in second
    contained = make_launch(plan_for(glm, "vllm", "2x8xh200"), ENDPOINT, [], contained=True)
    script = shlex.split(render(contained, "docker").split("\n\n")[0].split("\n", 1)[1])[-1]
    assert script.startswith("ray start --head")
    assert "&& exec vllm serve /model" in script
    compose = list(yaml.safe_load_all(render(contained, "compose")))
    assert len(compose) == 2
