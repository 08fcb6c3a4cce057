"""Existing commands read: what is environment, container, engine, option."""

import pytest

from fourge.errors import LaunchError
from fourge.launch.command import read
from fourge.launch.pattern import KNOWN
from launch_builders import PUBLISHED


def flags(text: str) -> dict[str, tuple[str, ...]]:
    (command,) = read(text)
    return {argument.flag: argument.values for argument in command.arguments}


def test_card_of_vllm_is_unwrapped_through_both_quotings():
    (command,) = read((PUBLISHED / "card-vllm.sh").read_text())
    assert (command.engine, command.model) == ("vllm", "lukealonso/GLM-5.1-NVFP4-MTP")
    found = {argument.flag: argument.values for argument in command.arguments}
    assert len(found) == 24
    assert found["--hf-overrides"] == (f'{{"index_topk_pattern":"{KNOWN}F"}}',)
    assert found["--speculative-config"][0].startswith('{"model":"lukealonso/')
    assert found["--enable-auto-tool-choice"] == ()
    assert len(command.environment) == 27
    assert dict(command.environment)["NCCL_P2P_LEVEL"] == "SYS"
    assert command.container is not None
    assert command.container.image.startswith("voipmonitor/vllm:glm51-mtp")
    assert ("--privileged", None) in command.container.options
    assert sum(flag == "-v" for flag, _ in command.container.options) == 7


def test_card_of_sglang():
    (command,) = read((PUBLISHED / "card-sglang.sh").read_text())
    assert (command.engine, command.container) == ("sglang", None)
    assert len(command.arguments) == 25
    assert dict(command.environment)["NVIDIA_VISIBLE_DEVICES"] == "1,2,3,4,5,6,7,8"


@pytest.mark.parametrize(
    "text",
    [
        "vllm serve m --port 1",
        "sudo -E env A=1 nohup vllm serve m --port 1 &",
        "A=1 exec /opt/venv/bin/vllm serve m --port 1 > log 2>&1",
        "numactl -N 0 -m 0 vllm serve m --port 1",
        "bash -lc 'vllm serve m --port 1'",
        "docker run --rm --gpus all -p 1:1 vllm/vllm-openai:v1 m --port 1",
        "podman run -it --entrypoint vllm some/image serve m --port 1",
        'docker run -d img bash -c "cd / && vllm serve m --port 1"',
        "cd /x; P=1; export P\nvllm serve m --port $P",
        "uv run vllm serve m --port=1",
        "services:\n  a:\n    image: vllm/vllm-openai\n    command: m --port ${P:-1}\n",
        "services:\n  a:\n    image: x\n    command: [vllm, serve, m, --port, 1]\n",
    ],
)
def test_wrappings(text: str):
    (command,) = read(text)
    assert (command.engine, command.model) == ("vllm", "m")
    assert flags(text) == {"--port": ("1",)}


def test_exported_variables_reach_the_engine_and_others_do_not():
    text = "A=1\nexport B=2\nC=3; export C\nexport -n\nunset B\nD=4 vllm serve m\n"
    assert dict(read(text)[0].environment) == {"C": "3", "D": "4"}


def test_environment_of_compose_in_both_forms():
    for environment in ("{A: 1, B: ''}", "[A=1, B=]"):
        text = f"services:\n  a:\n    image: vllm\n    command: m\n    environment: {environment}\n"
        assert dict(read(text)[0].environment) == {"A": "1", "B": ""}


def test_several_launches():
    text = "vllm serve a\npython3 -m sglang.launch_server --model-path b\n"
    assert [command.engine for command in read(text)] == ["vllm", "sglang"]


def test_something_after_the_backslash_is_noticed():
    text = "vllm serve m \\ # here\n  --port 1 \\ \n --host h\n"
    (command,) = read(text)
    assert command.broken_lines == (1, 2)
    assert flags(text) == {"--port": ("1",), "--host": ("h",)}


@pytest.mark.parametrize(
    "text", ["", "echo hi", "services:\n  a: {image: nginx}\n", "vllm bench x"]
)
def test_no_launch(text: str):
    with pytest.raises(LaunchError, match="no launch of vLLM or SGLang"):
        read(text)


def test_broken_compose():
    with pytest.raises(LaunchError, match="compose file cannot be read"):
        read("services:\n  a: [\n")
