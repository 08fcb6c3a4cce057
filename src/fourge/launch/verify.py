"""Validation by an engine that is installed: its own parser and config objects, in its own Python.

One environment holds only one of the two engines, and not fourge's torch; so ask.py runs there
as a process of its own.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourge.errors import LaunchError

ASK = Path(__file__).parent / "engine_side" / "ask.py"
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Verified:
    """What the installed engine says: of each command, what is wrong with it."""

    version: str
    problems: tuple[tuple[str, ...], ...]


def verify(
    engine: str, commands: Sequence[Sequence[str]], python: str, environment: Mapping[str, str]
) -> Verified:
    """Ask the engine of ``python`` about the words of commands, without those of the program.

    Raises LaunchError where that Python or its engine does not run.
    """
    environment = dict(environment)
    done = _run(engine, commands, python, environment)
    if done.returncode and "Failed to infer device type" in done.stderr:
        done = _run(engine, commands, python, environment | {"VLLM_TARGET_DEVICE": "cpu"})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LaunchError(
            f"--verify: {python} could not ask {engine} ({last}); give the Python of the"
            f" environment in which {engine} is installed."
        )
    answer = json.loads(done.stdout)
    return Verified(answer["version"], tuple(map(tuple, answer["problems"])))


def _run(
    engine: str, commands: Sequence[Sequence[str]], python: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [python, str(ASK), engine],
            input=json.dumps([list(words) for words in commands]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"--verify: {python} does not run ({error}).") from None
