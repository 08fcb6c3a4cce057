"""``fourge check-launch``: what an existing launch command says, and the command put right."""

import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fourge.cli.arguments import AsJson, EnginePython
from fourge.cli.show import console, print_json, say
from fourge.errors import LaunchError
from fourge.launch import hardware as machines
from fourge.launch import rewrite
from fourge.launch.catalogue import load
from fourge.launch.check import Review, review
from fourge.launch.command import read
from fourge.launch.rules import VERDICTS, Finding
from fourge.launch.verify import verify as ask_engine

STYLES = {
    "kept": "dim",
    "renamed": "yellow",
    "fork-only": "red",
    "ignored": "yellow",
    "redundant": "cyan",
    "dangerous": "bold red",
    "invalid": "bold red",
}
LONGEST_VALUE = 48

File = Annotated[
    Path, typer.Argument(help="Shell script, docker command or compose file; - reads stdin.")
]
EngineVersion = Annotated[
    str | None,
    typer.Option(
        "--engine-version", help="Release to check against. Default: the newest one known."
    ),
]
Machine = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="MACHINE",
        help="Check backends against these GPUs, for example 8xrtx-pro-6000.",
    ),
]


def check_launch(
    file: File,
    engine_version: EngineVersion = None,
    hardware: Machine = None,
    verify: EnginePython = None,
    json: AsJson = False,
) -> None:
    """Check every option, variable and container option of the launch command in FILE.

    Prints the findings, and the corrected command on stdout. Exit status 1 if something has to be
    changed.
    """
    family = machines.parse(hardware).gpu.family if hardware else None
    reviews = [
        review(command, load(command.engine, engine_version), family)
        for command in read(_text(file))
    ]
    problems = [_problems(one, verify) for one in reviews] if verify else []
    if json:
        documents = [_document(one) for one in reviews]
        for document, found in zip(documents, problems, strict=False):
            document["problems"] = found
        needed = any(one.needs_change for one in reviews)
        print_json({"needs_change": needed, "commands": documents})
    else:
        for one in reviews:
            _show(one)
        print("\n\n".join(rewrite.text(one.corrected) for one in reviews))
    if any(one.needs_change for one in reviews) or any(problems):
        raise typer.Exit(1)


def _text(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LaunchError(
            f"{file} is no text; needed is a shell script, docker command or compose file."
        ) from None


def _problems(one: Review, python: str) -> list[str]:
    """What the installed engine finds wrong with the corrected command."""
    command = one.corrected
    words = rewrite.words(command)[len(command.program) :]
    answer = ask_engine(command.engine, [words], python, os.environ)
    (problems,) = answer.problems
    for problem in problems:
        say(f"{command.engine} {answer.version} refuses the corrected command: {problem}")
    if not problems:
        say(f"{command.engine} {answer.version} takes the corrected command")
    return list(problems)


def _document(one: Review) -> dict[str, Any]:
    return {
        "engine": one.command.engine,
        "engine_version": one.version,
        "needs_change": one.needs_change,
        "counts": _counts(one),
        "findings": [
            asdict(finding) | {"needs_change": finding.needs_change} for finding in one.findings
        ],
        "advice": list(one.advice),
        "corrected": {
            "text": rewrite.text(one.corrected),
            "argv": rewrite.words(one.corrected),
            "environment": dict(one.corrected.environment),
            "image": one.corrected.container.image if one.corrected.container else None,
        },
    }


def _counts(one: Review) -> dict[str, int]:
    counted = Counter(finding.verdict for finding in one.findings)
    return {verdict: counted[verdict] for verdict in VERDICTS if counted[verdict]}


def _show(one: Review) -> None:
    """A line per finding, in one piece: a table would take as long as everything else."""
    width = max((len(_what(finding)) for finding in one.findings), default=0)
    text = Text()
    for finding in one.findings:
        text.append(f"{finding.verdict:9}  ", STYLES[finding.verdict])
        text.append(f"{_what(finding):{width}}  {_why(finding)}".rstrip() + "\n")
    for sentence in one.advice:
        text.append("advice     ", "cyan").append(sentence + "\n")
    told = ", ".join(f"{count} {verdict}" for verdict, count in _counts(one).items())
    text.append(f"{one.command.engine} {one.version}: {told}\n")
    console.print(text, soft_wrap=True)


def _what(finding: Finding) -> str:
    value = finding.value
    if len(value) > LONGEST_VALUE:
        value = value[: LONGEST_VALUE - 3] + "..."
    joint = "=" if finding.kind == "variable" else " "
    return f"{finding.name}{joint}{value}".rstrip()


def _why(finding: Finding) -> str:
    if not finding.becomes:
        return finding.reason
    words = " ".join(finding.becomes)
    if len(words) > LONGEST_VALUE:
        words = words[: LONGEST_VALUE - 3] + "..."
    return f"{finding.reason} -> {words}"
