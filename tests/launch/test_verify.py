"""--verify: the engine's own parser, asked in a Python of its own; here a fake package's."""

import os
import sys
from pathlib import Path

import pytest

from fourge.errors import LaunchError
from fourge.launch.verify import verify

# A package of the shape that ask.py expects of SGLang, with two options.
SGLANG = """
class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        print("engines print while they are imported")
        parser.add_argument("--model-path", required=True)
        parser.add_argument("--tp-size", type=int)
        parser.add_argument("--json-model-override-args", default="{}")
"""
METADATA = "Metadata-Version: 2.1\nName: sglang\nVersion: 9.9.9\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which that package is installed."""
    module = tmp_path / "sglang" / "srt" / "server_args.py"
    module.parent.mkdir(parents=True)
    module.write_text(SGLANG)
    information = tmp_path / "sglang-9.9.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(METADATA)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def problems(environment: dict[str, str], *words: str) -> tuple[str, ...]:
    answer = verify("sglang", [words], sys.executable, environment)
    assert answer.version == "9.9.9"
    (found,) = answer.problems
    return found


def test_good_words(environment: dict[str, str]):
    assert problems(environment, "--model-path", "m", "--tp-size", "8") == ()


def test_names_are_exact(environment: dict[str, str]):
    assert problems(environment, "--model-path", "m", "--tp", "8") == (
        "unrecognized arguments: --tp 8",
    )


def test_values(environment: dict[str, str]):
    (told,) = problems(environment, "--model-path", "m", "--tp-size", "x")
    assert "invalid int value: 'x'" in told
    (told,) = problems(environment, "--model-path", "m", "--json-model-override-args", "{x")
    assert told.startswith("json_model_override_args:")


def test_several_commands_are_asked_about_at_once(environment: dict[str, str]):
    commands = [["--model-path", "m"], ["--model-path"], ["--model-path", "m", "--tp-size", "2"]]
    answer = verify("sglang", commands, sys.executable, environment)
    assert [len(problems) for problems in answer.problems] == [0, 1, 0]


def test_python_without_the_engine():
    with pytest.raises(LaunchError, match=r"could not ask sglang .*No module named 'sglang'"):
        verify("sglang", [[]], sys.executable, {**os.environ, "PYTHONPATH": ""})


def test_no_python(tmp_path: Path):
    with pytest.raises(LaunchError, match="does not run"):
        verify("sglang", [[]], str(tmp_path / "python"), dict(os.environ))
