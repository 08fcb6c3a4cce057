"""A launch as text: shell, docker, compose, JSON, or the explanation of it.

All of them are made from the same commands; quoting is the shell's, of every word that needs it.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fourge.launch import sglang, vllm
from fourge.launch.memory import GIB
from fourge.launch.options import Endpoint, HostCommand, Variable
from fourge.launch.plan import Choice, Plan
from fourge.launch.releases import RELEASES

FORMATS = ("shell", "docker", "compose", "json", "explain")
IN_CONTAINER = ("docker", "compose")
MODEL_IN_CONTAINER = "/model"
CACHE_IN_CONTAINER = "/cache"
CACHE_VOLUME = "fourge-engine-cache"


@dataclass(frozen=True, slots=True)
class Launch:
    """A plan with its commands. ``contained`` says whether they are for a container."""

    plan: Plan
    commands: tuple[HostCommand, ...]
    choices: tuple[Choice, ...]
    contained: bool

    @property
    def image(self) -> str:
        return RELEASES[self.plan.engine].image

    @property
    def version(self) -> str:
        return RELEASES[self.plan.engine].version


def make_launch(plan: Plan, endpoint: Endpoint, hosts: Sequence[str], *, contained: bool) -> Launch:
    """The commands of every host."""
    engine = vllm if plan.engine == "vllm" else sglang
    folder = MODEL_IN_CONTAINER if contained else str(plan.served.folder.resolve())
    found = engine.commands(plan, endpoint, hosts, folder)
    choices = (*plan.choices, *engine.left_to_engine(plan))
    return Launch(plan, tuple(found), choices, contained)


def render(launch: Launch, form: str) -> str:
    """The text of ``launch`` in one of FORMATS but json, without a final line end."""
    if form == "explain":
        return "\n".join(_explain(launch))
    if form == "compose":
        return _compose(launch)
    blocks = []
    for command in launch.commands:
        lines = [f"# on {command.host}"] if len(launch.commands) > 1 else []
        body = _docker(launch, command) if form == "docker" else _shell(command)
        blocks.append("\n".join([*lines, body]))
    return "\n\n".join(blocks)


# -- shell ----------------------------------------------------------------------------------------


def _shell(command: HostCommand) -> str:
    lines = [f"export {one.name}={shlex.quote(one.value)}" for one in command.environment]
    lines += [shlex.join(words) for words in command.setup]
    if command.program:
        lines.append(_engine(command))
    return "\n".join(lines)


def _engine(command: HostCommand) -> str:
    """The engine's command, an option to a line."""
    parts = [shlex.join(command.program), *(shlex.join(one.words) for one in command.options)]
    return " \\\n  ".join(parts)


# -- containers -----------------------------------------------------------------------------------


def container_environment(launch: Launch, command: HostCommand) -> list[Variable]:
    """The variables of a container: caches of compiled kernels outlive it in one volume."""
    caches = [Variable("XDG_CACHE_HOME", CACHE_IN_CONTAINER, "compiled kernels are kept")]
    if launch.plan.engine == "vllm":
        root = f"{CACHE_IN_CONTAINER}/vllm"
        caches.append(Variable("VLLM_CACHE_ROOT", root, "compiled graphs are kept"))
    return [*command.environment, *caches]


def _volumes(launch: Launch) -> list[str]:
    return [
        f"{launch.plan.served.folder.resolve()}:{MODEL_IN_CONTAINER}:ro",
        f"{CACHE_VOLUME}:{CACHE_IN_CONTAINER}",
    ]


def _words(command: HostCommand) -> list[str]:
    """What a container runs: the engine, after the setup where there is one."""
    if not command.setup:
        return command.words
    steps = [shlex.join(words) for words in command.setup]
    if command.program:
        steps.append("exec " + shlex.join(command.words))
    return ["bash", "-c", " && ".join(steps)]


def _docker(launch: Launch, command: HostCommand) -> str:
    program, *rest = _words(command)
    parts = [
        f"docker run --rm --name fourge-{launch.plan.engine}",
        "--gpus all",
        "--ipc=host",
        "--network host",
        "--ulimit memlock=-1",
        *(
            f"-e {shlex.quote(f'{one.name}={one.value}')}"
            for one in container_environment(launch, command)
        ),
        *(f"-v {shlex.quote(volume)}" for volume in _volumes(launch)),
        f"--entrypoint {program}",
        launch.image,
    ]
    if command.setup:
        parts.append(shlex.join(rest))
    else:
        parts.append(shlex.join([*command.program[1:]]))
        parts += [shlex.join(one.words) for one in command.options]
    return " \\\n  ".join(parts)


def _compose(launch: Launch) -> str:
    """A compose file; of several hosts a document each, which belongs into a file of its own."""
    import yaml  # only for this format

    documents = []
    for command in launch.commands:
        program, *rest = _words(command)
        environment = {
            one.name: one.value.replace("$", "$$") for one in container_environment(launch, command)
        }
        devices = [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
        service = {
            "image": launch.image,
            "entrypoint": [program],
            "command": [word.replace("$", "$$") for word in rest],
            "network_mode": "host",
            "ipc": "host",
            "ulimits": {"memlock": -1},
            "environment": environment,
            "volumes": _volumes(launch),
            "deploy": {"resources": {"reservations": {"devices": devices}}},
        }
        document = {"services": {launch.plan.engine: service}, "volumes": {CACHE_VOLUME: None}}
        text = yaml.safe_dump(document, sort_keys=False, width=10_000)
        head = f"# on {command.host}\n" if len(launch.commands) > 1 else ""
        documents.append(head + text.rstrip("\n"))
    return "\n---\n".join(documents)


# -- JSON and explanation -------------------------------------------------------------------------


def document(launch: Launch) -> dict[str, Any]:
    """The launch as one JSON document."""
    plan = launch.plan
    memory = plan.memory
    return {
        "engine": plan.engine,
        "engine_version": launch.version,
        "image": launch.image,
        "profile": plan.request.profile,
        "hardware": {
            "name": plan.hardware.name,
            "gpu": plan.hardware.gpu.title,
            "architecture": plan.hardware.gpu.architecture,
            "gpus_per_host": plan.hardware.per_host,
            "hosts": plan.hardware.hosts,
        },
        "parallel": asdict(plan.parallel),
        "context": plan.context,
        "sequences": plan.load.sequences,
        "draft_tokens": plan.load.drafts,
        "chunk": plan.load.chunk,
        "kv_cache": plan.kv,
        "index_pattern": plan.request.pattern,
        "memory": asdict(memory) | {"cache": memory.cache, "tokens": memory.tokens},
        "tokens": plan.tokens,
        "choices": [asdict(choice) for choice in launch.choices],
        "warnings": list(plan.warnings),
        "commands": [_command_document(launch, command) for command in launch.commands],
    }


def _command_document(launch: Launch, command: HostCommand) -> dict[str, Any]:
    return {
        "host": command.host,
        "setup": [list(words) for words in command.setup],
        "environment": {one.name: one.value for one in command.environment},
        "argv": command.words,
        "options": [asdict(option) for option in command.options],
    }


def _explain(launch: Launch) -> Iterator[str]:
    plan = launch.plan
    yield (
        f"{plan.served.folder} on {plan.hardware.name} with {plan.engine} {launch.version},"
        f" profile {plan.request.profile}"
    )
    yield "\nMemory of one GPU"
    yield from _memory_table(plan)
    yield "\nChoices"
    yield from _table([(one.name, one.value, one.reason) for one in launch.choices])
    first = launch.commands[0]
    yield "\nOptions"
    rows = []
    for option in first.options:
        value = option.value or ""
        rows.append((option.flag, value if len(value) <= 60 else value[:57] + "...", option.reason))
    yield from _table(rows)
    yield "\nEnvironment"
    yield from _table([(one.name, one.value, one.reason) for one in first.environment])
    for warning in plan.warnings:
        yield f"\nwarning: {warning}"


def _memory_table(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    taken = int(memory.total * memory.share)
    rows = [
        ("memory", memory.total, plan.hardware.gpu.title),
        (f"the engine's share, {memory.share:g}", taken, _share_reason(plan)),
        ("weights", memory.weights, f"{plan.served.weights.total / 1e9:.1f} GB in all"),
        ("MTP layer", memory.mtp, f"{plan.served.mtp_experts} experts" if memory.mtp else "off"),
        ("activations", memory.activations, f"chunks of {plan.load.chunk:,} tokens"),
        ("CUDA graphs", memory.graphs, f"up to {plan.load.graph} tokens at once"),
        ("runtime", memory.runtime, "CUDA context, NCCL"),
        ("KV cache", memory.cache, f"{memory.bytes_per_token:,} bytes per token"),
    ]
    yield from _table(
        [
            (name, f"{size / GIB:8.2f} GiB", note)
            for name, size, note in rows
            if size or name == "MTP layer"
        ]
    )
    each = " on each replica" if plan.parallel.data > 1 else ""
    yield f"  {memory.tokens:,} tokens fit{each}, {memory.tokens / plan.context:.2f} whole contexts"


def _share_reason(plan: Plan) -> str:
    if plan.engine == "vllm":
        return "--gpu-memory-utilization; everything below lies in it"
    given = "sglang" in plan.hardware.gpu.utilization
    chosen = "--mem-fraction-static" if given else "what SGLang chooses by itself"
    return f"{chosen}: weights and cache; activations and graphs lie outside it"


def _table(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for name, value, reason in rows:
        yield f"  {name:{widths[0]}}  {value:{widths[1]}}  {reason}".rstrip()
