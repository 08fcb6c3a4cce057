"""``fourge launch``: a checked, explained command for vLLM or SGLang, and the engine started."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from fourge.cli.arguments import AsJson, EnginePython
from fourge.cli.show import console, print_json, say
from fourge.errors import LaunchError
from fourge.launch import hardware as machines
from fourge.launch.options import Endpoint
from fourge.launch.plan import Request
from fourge.launch.planner import make_plan
from fourge.launch.releases import RELEASES
from fourge.launch.render import IN_CONTAINER, Launch, document, make_launch, render
from fourge.launch.served import look_at
from fourge.launch.verify import verify as ask_engine

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

Checkpoint = Annotated[Path, typer.Argument(help="Folder of the checkpoint to serve.")]
Engine = Annotated[Literal["vllm", "sglang"], typer.Option("--engine", help="What serves it.")]
Machine = Annotated[
    str,
    typer.Option(
        "--hardware",
        metavar="MACHINE",
        help="8xrtx-pro-6000, 4xh200, 2x8xh200 (two hosts), dgx-spark, ...; auto asks the driver.",
    ),
]
Profile = Annotated[
    Literal["latency", "throughput", "agentic-safe"],
    typer.Option(
        "--profile",
        help="Few users with drafting; many users; or no drafting, for agents' tool calls.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context", metavar="TOKENS", help="Longest request. Default: what fits."),
]
Form = Annotated[
    Literal["shell", "docker", "compose", "json", "explain"],
    typer.Option("--format", help="explain prints the memory table and every reason."),
]
Mtp = Annotated[
    Literal["on", "off"] | None,
    typer.Option("--mtp", help="Draft with the MTP layer, or not. Default: by profile."),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        "--index-pattern",
        metavar="LETTERS",
        help="Layers that select by themselves (F) or share (S): a trade of quality for speed.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--served-model-name", help="What clients ask for. Default: the folder's name."),
]
Host = Annotated[str, typer.Option("--host", help="Interface to listen on.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="What clients must send; needed beyond this host."),
]
Hosts = Annotated[
    str | None,
    typer.Option("--hosts", metavar="A,B", help="Names of the hosts, the first one answers."),
]
Run = Annotated[
    bool, typer.Option("--run", help="Start the engine here, wait for it and test it; Ctrl-C ends.")
]


def launch(
    checkpoint: Checkpoint,
    engine: Engine,
    hardware: Machine = "auto",
    profile: Profile = "latency",
    context: Context = None,
    form: Form = "shell",
    mtp: Mtp = None,
    index_pattern: Pattern = None,
    served_model_name: ModelName = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    hosts: Hosts = None,
    verify: EnginePython = None,
    run: Run = False,
    json: AsJson = False,
) -> None:
    """Print a command that serves CHECKPOINT on this hardware, with every choice explained.

    Plans from headers and config alone: needs neither a GPU nor the engine. What does not fit is
    refused with the figures and with what would fit.
    """
    if host not in LOCAL_HOSTS and api_key is None:
        raise LaunchError(
            f"--host {host} opens the server to the network; give --api-key as well, or leave the"
            " host at 127.0.0.1."
        )
    names = [name.strip() for name in hosts.split(",")] if hosts else []
    machine = _machine(hardware, names)
    request = Request(
        engine=engine,
        hardware=machine,
        profile=profile,
        context=context,
        mtp=None if mtp is None else mtp == "on",
        pattern=index_pattern,
    )
    plan = make_plan(look_at(checkpoint), request)
    if run and machine.hosts > 1:
        raise LaunchError(
            f"--run starts one host, {machine.name} has {machine.hosts}; run the printed commands"
            " on each of them."
        )
    name = served_model_name or checkpoint.resolve().name
    endpoint = Endpoint(name, host, port, api_key)
    chosen = "json" if json else form
    made = make_launch(plan, endpoint, names, contained=chosen in IN_CONTAINER and not run)
    problems = _verified(made, verify) if verify else ()
    if chosen == "json" and not run:
        print_json(document(made) | ({"problems": list(problems)} if verify else {}))
    elif not run:
        print(render(made, chosen))
    if chosen != "explain":
        _summary(made)
    if problems:
        raise typer.Exit(1)
    if run:
        _run(made, endpoint, json=chosen == "json")


def _machine(name: str, hosts: list[str]) -> machines.Hardware:
    machine = machines.detect() if name == "auto" else machines.parse(name)
    if hosts and machine.hosts == 1:
        return machines.Hardware(machine.gpu, machine.per_host, len(hosts))
    if hosts and len(hosts) != machine.hosts:
        raise LaunchError(
            f"--hosts names {len(hosts)} hosts, --hardware {name} has {machine.hosts}; name each."
        )
    return machine


def _verified(made: Launch, python: str) -> tuple[str, ...]:
    """What the installed engine finds wrong with the commands."""
    engine = made.plan.engine
    skipped = len(RELEASES[engine].program)
    words = [command.words[skipped:] for command in made.commands if command.program]
    answer = ask_engine(engine, words, python, os.environ)
    problems = [problem for one in answer.problems for problem in one]
    if answer.version != made.version:
        say(f"{engine} {answer.version} is installed, the plan is for {made.version}")
    for problem in problems:
        say(f"{engine} {answer.version} refuses: {problem}")
    if not problems:
        say(f"{engine} {answer.version} takes the command")
    return tuple(problems)


def _summary(made: Launch) -> None:
    """The choices, one to a line, beside the command on stdout."""
    plan = made.plan
    width = max(len(choice.name) for choice in made.choices)
    for choice in made.choices:
        say(f"{choice.name:{width}}  {choice.value} ({choice.reason})")
    for warning in plan.warnings:
        console.print("[yellow]warning:[/] ", end="")
        say(warning)
    if plan.hardware.hosts > 1:
        say(f"run the commands on all {plan.hardware.hosts} hosts; the first one answers clients")


def _run(made: Launch, endpoint: Endpoint, *, json: bool) -> None:
    # Needs an HTTP client, which printing a command does not.
    from fourge.cli.running import run_engine

    if not run_engine(made, endpoint, as_json=json):
        raise typer.Exit(1)
