"""Every command that fourge makes, and every corrected one, through the engines' own parsers.

    scripts/check_with_engines.py --vllm PYTHON --sglang PYTHON CHECKPOINT ...

The Pythons are those of environments that hold the engines (scripts/engine_environment.sh makes
them without a GPU). For each checkpoint all machines that it fits on, all profiles, with and
without an index pattern; of tests/launch/published the corrected commands. Prints what an engine
refuses; exit status 1 if there is anything.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fourge.errors import LaunchError
from fourge.launch import rewrite
from fourge.launch.catalogue import load
from fourge.launch.check import review
from fourge.launch.command import read
from fourge.launch.hardware import machines
from fourge.launch.options import Endpoint
from fourge.launch.pattern import KNOWN
from fourge.launch.plan import ENGINES, PROFILES, Request
from fourge.launch.planner import make_plan
from fourge.launch.releases import RELEASES
from fourge.launch.render import make_launch
from fourge.launch.served import look_at
from fourge.launch.verify import verify

PUBLISHED = Path(__file__).parent.parent / "tests" / "launch" / "published"
Words = tuple[str, ...]


def made(checkpoint: Path) -> Iterator[tuple[str, Words]]:
    """Engine and words of every command for ``checkpoint``."""
    served = look_at(checkpoint)
    for engine, machine, profile, pattern in itertools.product(
        ENGINES, machines(), PROFILES, (None, KNOWN)
    ):
        request = Request(engine=engine, hardware=machine, profile=profile, pattern=pattern)
        try:
            plan = make_plan(served, request)
        except LaunchError:
            continue
        endpoint = Endpoint("model", "127.0.0.1", 8000, "key")
        for command in make_launch(plan, endpoint, [], contained=False).commands:
            if command.program:
                yield engine, tuple(command.words[len(RELEASES[engine].program) :])


def corrected() -> Iterator[tuple[str, Words]]:
    """Engine and words of every published command, put right."""
    for path in sorted(PUBLISHED.iterdir()):
        for command in read(path.read_text()):
            right = review(command, load(command.engine)).corrected
            yield command.engine, tuple(rewrite.words(right)[len(right.program) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--sglang", metavar="PYTHON")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    given = parser.parse_args()
    pythons = {name: getattr(given, name) for name in ENGINES if getattr(given, name)}
    everything = {*corrected(), *(one for path in given.checkpoints for one in made(path))}
    refused = 0
    for engine, python in pythons.items():
        words = sorted(words for name, words in everything if name == engine)
        answer = verify(engine, words, python, os.environ)
        for command, problems in zip(words, answer.problems, strict=True):
            refused += len(problems)
            for problem in problems:
                print(f"{problem}\n  {' '.join(command)}")
        print(f"{engine} {answer.version}: {len(words)} commands, {refused} refusals")
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    main()
