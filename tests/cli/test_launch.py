"""launch and check-launch as a user runs them: forms, exit status, errors, imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourge.launch.pattern import KNOWN
from fourge_process import Finished, run, run_fresh
from hollow_checkpoint import GLM_5_1, write_hollow_nvfp4
from launch_builders import PUBLISHED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-5.1 in NVFP4, all 232,670 tensors."""
    folder = tmp_path_factory.mktemp("model") / "GLM-5.1-NVFP4"
    write_hollow_nvfp4(folder, GLM_5_1, tensors_per_shard=2800)
    return folder


def launch(model: Path, *options: str) -> Finished:
    return run("launch", model, "--hardware", "8xrtx-pro-6000", *options)


def test_shell_on_stdout_and_reasons_on_stderr(model: Path):
    done = launch(model, "--engine", "vllm")
    assert done.status == 0
    assert done.stdout.startswith("export CUDA_DEVICE_ORDER=PCI_BUS_ID\n")
    assert f"vllm serve {model} \\\n" in done.stdout
    for line in ("parallelism", "context", "MTP", "KV cache", "attention", "MoE", "sampling"):
        assert f"\n{line} " in f"\n{done.stderr}"
    # The text runs as it is: a shell makes the same words of it.
    script = done.stdout.replace("vllm serve", "printf '%s\\n'")
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    argv = json.loads(launch(model, "--engine", "vllm", "--json").stdout)["commands"][0]["argv"]
    assert words.stdout.splitlines() == argv[2:]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_json_both_ways(model: Path, engine: str):
    short = launch(model, "--engine", engine, "--json")
    long = launch(model, "--engine", engine, "--format", "json")
    assert short.stdout == long.stdout
    document = json.loads(short.stdout)
    assert document["memory"]["bytes_per_token"] == 62_252
    assert document["hardware"]["name"] == "8xrtx-pro-6000"


def test_explain(model: Path):
    done = launch(model, "--engine", "vllm", "--format", "explain")
    assert "Memory of one GPU" in done.stdout
    assert "62,252 bytes per token" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("form", ["docker", "compose"])
def test_printed_launches_pass_check_launch(model: Path, tmp_path: Path, form: str):
    done = launch(model, "--engine", "vllm", "--format", form)
    (tmp_path / "launch").write_text(done.stdout)
    assert run("check-launch", tmp_path / "launch").status == 0


def test_two_hosts(model: Path):
    done = run("launch", model, "--engine", "sglang", "--hardware", "8xh200", "--hosts", "a,b")
    assert "# on a\n" in done.stdout
    assert "--node-rank 1" in done.stdout.split("# on b\n")[1]
    assert "run the commands on all 2 hosts" in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hardware", "4xrtx-pro-6000"], "would do."),
        (["--hardware", "9xh900"], "--hardware 9xh900 is not known"),
        (["--hardware", "8xh200", "--host", "0.0.0.0"], "give --api-key as well"),
        (["--hardware", "8xh200", "--context", "300000"], "202752 tokens"),
        (["--hardware", "8xh200", "--index-pattern", KNOWN[1:]], "it has 77 letters"),
        (["--hardware", "2x8xh200", "--hosts", "a"], "--hosts names 1 hosts"),
        (["--hardware", "2x8xh200", "--run"], "--run starts one host"),
        (["--hardware", "8xh200", "--verify", "/no/python"], "does not run"),
    ],
)
def test_refusals(model: Path, options: list[str], told: str):
    done = run("launch", model, "--engine", "vllm", *options)
    assert done.status == 2
    assert told in done.stderr
    assert done.stderr.count("fourge:") == 1
    assert done.stdout == ""


def test_hardware_auto_without_a_gpu(model: Path):
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a GPU")
    done = run("launch", model, "--engine", "vllm")
    assert done.status == 2
    assert "name the machine instead" in done.stderr


def test_no_checkpoint(tmp_path: Path):
    done = run("launch", tmp_path / "nothing", "--engine", "vllm", "--hardware", "8xh200")
    assert (done.status, "is not a folder" in done.stderr) == (2, True)
    done = run("launch", tmp_path, "--engine", "vllm", "--hardware", "8xh200")
    assert (done.status, "config.json is missing" in done.stderr) == (2, True)


# -- check-launch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["card-vllm.sh", "card-sglang.sh"])
def test_cards_are_corrected_on_stdout(tmp_path: Path, card: str):
    done = run("check-launch", PUBLISHED / card)
    assert done.status == 1
    assert "dangerous" in done.stderr
    corrected = tmp_path / "corrected"
    corrected.write_text(done.stdout)
    again = run("check-launch", corrected)
    assert again.status == 0
    assert again.stdout == done.stdout


def test_json_of_a_check():
    document = json.loads(run("check-launch", PUBLISHED / "card-sglang.sh", "--json").stdout)
    assert document["needs_change"] is True
    (command,) = document["commands"]
    assert (command["engine"], command["engine_version"]) == ("sglang", "0.5.23")
    assert command["counts"]["renamed"] == 5
    findings = {one["name"]: one for one in command["findings"]}
    assert findings["--cuda-graph-max-bs"]["becomes"] == ["--cuda-graph-max-bs-decode", "8"]
    assert findings["--json-model-override-args"]["needs_change"] is True
    assert "--dsa-prefill-backend" not in command["corrected"]["argv"]


def test_standard_input():
    command = "vllm serve m --max-model-len 4096 --tensor-parallel-size 8"
    done = subprocess.run(
        [sys.executable, "-m", "fourge.cli.main", "check-launch", "-"],
        input=command, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (
        0,
        "vllm serve m \\\n  --max-model-len 4096 \\\n  --tensor-parallel-size 8\n",
    )


def test_hardware_of_a_check(tmp_path: Path):
    file = tmp_path / "launch.sh"
    file.write_text("vllm serve m --moe-backend flashinfer_trtllm\n")
    assert run("check-launch", file).status == 0
    assert run("check-launch", file, "--hardware", "8xb200").status == 0
    assert run("check-launch", file, "--hardware", "8xrtx-pro-6000").status == 1


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (b"echo hi\n", (), "no launch of vLLM or SGLang"),
        (b"vllm serve m --x 'y\n", (), "the ' of line 1 is never closed"),
        (b"\xff\xfe\x00", (), "is no text"),
        (b"vllm serve m\n", ("--engine-version", "0.1"), "no catalogue of vllm 0.1"),
        (b"vllm serve m\n", ("--hardware", "x"), "--hardware x is not known"),
    ],
)
def test_unusable_input(tmp_path: Path, content: bytes, options: tuple[str, ...], told: str):
    file = tmp_path / "launch"
    file.write_bytes(content)
    done = run("check-launch", file, *options)
    assert (done.status, told in done.stderr, done.stdout) == (2, True, "")


def test_missing_file(tmp_path: Path):
    done = run("check-launch", tmp_path / "none")
    assert (done.status, "No such file" in done.stderr) == (2, True)


# -- what is imported ------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["launch", "check-launch"])
def test_imports_neither_torch_nor_transformers(model: Path, verb: str):
    words = {
        "launch": ["launch", str(model), "--engine", "sglang", "--hardware", "8xh200", "--json"],
        "check-launch": ["check-launch", str(PUBLISHED / "card-vllm.sh")],
    }[verb]
    code = (
        "import sys, contextlib\n"
        "from fourge.cli.main import main\n"
        f"sys.argv = ['fourge', *{words!r}]\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "heavy = {'torch', 'transformers', 'numba', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_help_lists_the_verbs_and_a_wrong_one_is_refused():
    done = run_fresh("--help")
    assert "check-launch" in done.stdout
    assert run_fresh("lunch").status == 2
