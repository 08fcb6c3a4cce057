"""An existing launch command, read: environment, container, engine, options.

Shell scripts, ``docker run`` (and podman, nerdctl), ``bash -c`` scripts inside them, and compose
files. Knows how commands are written, nothing of what options mean.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from fourge.errors import LaunchError
from fourge.launch.shell import ASSIGNMENT, BROKEN_CONTINUATION, commands

Pairs = tuple[tuple[str, str], ...]
CONTAINER_PROGRAMS = ("docker", "podman", "nerdctl")
# Options of ``docker run`` that take no value; every other does.
SWITCHES = frozenset({
    "-d", "--detach", "-i", "--interactive", "-t", "--tty", "-it", "-ti", "-dit", "-itd", "--rm",
    "--privileged", "--init", "--read-only", "-P", "--publish-all", "--no-healthcheck",
    "--oom-kill-disable", "--sig-proxy", "--disable-content-trust", "-q", "--quiet",
    "--use-api-socket"
})  # fmt: skip
ENVIRONMENT_OPTIONS = ("-e", "--env")
_OPTION = re.compile(r"-{1,2}[A-Za-z][\w.+-]*(=.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Argument:
    """One option with the words after it; ``flag`` is as it was written."""

    flag: str
    values: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return [self.flag, *self.values]


@dataclass(frozen=True, slots=True)
class Container:
    """What surrounds the engine in ``docker run`` or a compose service."""

    program: str  # "docker", ..., or "compose"
    image: str
    options: tuple[tuple[str, str | None], ...] = ()  # without environment and entrypoint
    document: Any = None  # of a compose file
    service: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """One engine's launch."""

    engine: str
    program: tuple[str, ...]
    model: str | None  # where it is given by position
    arguments: tuple[Argument, ...]
    environment: Pairs
    container: Container | None = None
    strays: tuple[str, ...] = ()  # words that belong to no option
    broken_lines: tuple[int, ...] = ()  # where something follows the backslash at the end


def read(text: str) -> list[Command]:
    """Every engine launch of a script or compose file. Raises LaunchError if there is none."""
    found = list(_of_compose(text) if _is_compose(text) else _of_script(text, {}))
    if not found:
        raise LaunchError(
            "no launch of vLLM or SGLang is in it; needed is 'vllm serve ...', 'python -m"
            " vllm.entrypoints.openai.api_server ...', 'python -m sglang.launch_server ...' or"
            " 'sglang serve ...', by itself, in docker run or in a compose file."
        )
    broken = tuple(
        text.count("\n", 0, match.start()) + 1 for match in BROKEN_CONTINUATION.finditer(text)
    )
    return [replace(command, broken_lines=broken) for command in found]


# -- scripts --------------------------------------------------------------------------------------


def _of_script(text: str, inherited: Mapping[str, str]) -> Iterator[Command]:
    """Launches of a script that begins with the variables ``inherited`` in its environment."""
    variables = dict(inherited)
    exported = dict(inherited)
    for words in commands(text, variables):
        own, rest = _assignments(words)
        if not rest:
            variables |= own
            exported |= {name: value for name, value in own.items() if name in exported}
        elif rest[0] in ("export", "declare", "typeset", "set"):
            given, _ = _assignments([word for word in rest[1:] if not word.startswith("-")])
            names = [word for word in rest[1:] if word in variables]
            variables |= given
            exported |= given | {name: variables[name] for name in names}
        elif rest[0] == "unset":
            for name in rest[1:]:
                exported.pop(name, None)
        else:
            yield from _of_words(rest, exported | own)


def _assignments(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """NAME=VALUE words at the front, and what follows them."""
    found: dict[str, str] = {}
    for number, word in enumerate(words):
        match = ASSIGNMENT.fullmatch(word)
        if match is None:
            return found, words[number:]
        found[match[1]] = match[2]
    return found, []


def _of_words(words: list[str], environment: Mapping[str, str]) -> Iterator[Command]:
    """Launches of one simple command."""
    name = PurePosixPath(words[0]).name
    if name in ("sudo", "exec", "nohup", "command", "time", "env") and len(words) > 1:
        rest = words[1:]
        while rest and rest[0].startswith("-"):
            rest = rest[1:]
        own, rest = _assignments(rest)
        if rest:
            yield from _of_words(rest, {**environment, **own})
    elif name in CONTAINER_PROGRAMS and "run" in words[:3]:
        yield from _of_docker(name, words[words.index("run") + 1 :])
    elif name in ("bash", "sh", "zsh", "dash") and (script := _script(words)) is not None:
        yield from _of_script(script, environment)
    else:
        start = _engine_at(words)
        if start is not None:
            own, _ = _assignments([word for word in words[:start] if ASSIGNMENT.fullmatch(word)])
            pairs = tuple({**environment, **own}.items())
            yield _engine_command(words[start:], pairs)


def _script(words: list[str]) -> str | None:
    """The script of ``bash -lc SCRIPT``."""
    for number, word in enumerate(words[1:-1], start=1):
        if re.fullmatch(r"-[a-z]*c", word):
            return words[number + 1]
    return None


def _engine_at(words: list[str]) -> int | None:
    """Where the engine's program begins, after such as numactl."""
    for number in range(len(words)):
        if _program(words[number:]) is not None:
            return number
    return None


def _program(words: list[str]) -> tuple[str, int] | None:
    """The engine that ``words`` launch, and how many words name it."""
    name = PurePosixPath(words[0]).name
    if name in ("vllm", "sglang") and words[1:2] == ["serve"]:
        return name, 2
    if re.fullmatch(r"python[\d.]*", name) and words[1:2] == ["-m"]:
        module = words[2] if len(words) > 2 else ""
        if module == "vllm.entrypoints.openai.api_server":
            return "vllm", 3
        if module in ("sglang.launch_server", "sglang.srt.entrypoints.http_server"):
            return "sglang", 3
    return None


def _engine_command(words: list[str], environment: Pairs) -> Command:
    found = _program(words)
    assert found is not None
    engine, length = found
    return _with_arguments(engine, tuple(words[:length]), words[length:], environment)


def _with_arguments(
    engine: str, program: tuple[str, ...], words: list[str], environment: Pairs
) -> Command:
    takes_model = engine == "vllm" and words and not words[0].startswith("-")
    model = words[0] if takes_model else None
    arguments: list[Argument] = []
    strays: list[str] = []
    for word in words[1:] if takes_model else words:
        if _OPTION.fullmatch(word):
            flag, equals, value = word.partition("=")
            arguments.append(Argument(flag, (value,) if equals else ()))
        elif arguments:
            last = arguments[-1]
            arguments[-1] = replace(last, values=(*last.values, word))
        else:
            strays.append(word)
    return Command(engine, program, model, tuple(arguments), environment, strays=tuple(strays))


# -- containers -----------------------------------------------------------------------------------


def _of_docker(program: str, words: list[str]) -> Iterator[Command]:
    options: list[tuple[str, str | None]] = []
    environment: dict[str, str] = {}
    entrypoint: str | None = None
    position = 0
    while position < len(words) and words[position].startswith("-"):
        flag, equals, value = words[position].partition("=")
        position += 1
        taken: str | None = value if equals else None
        if not equals and flag not in SWITCHES:
            taken = words[position] if position < len(words) else ""
            position += 1
        if flag in ENVIRONMENT_OPTIONS:
            name, _, content = (taken or "").partition("=")
            environment[name] = content
        elif flag == "--entrypoint":
            entrypoint = taken
        else:
            options.append((flag, taken))
    if position >= len(words):
        return
    container = Container(program, words[position], tuple(options))
    inner = ([entrypoint] if entrypoint else []) + words[position + 1 :]
    yield from _inside(container, inner, environment)


def _inside(
    container: Container, words: list[str], environment: Mapping[str, str]
) -> Iterator[Command]:
    """The launch that a container runs; an image of an engine needs no program."""
    found = list(_of_words(words, environment)) if words else []
    engine = next((name for name in ("vllm", "sglang") if name in container.image), None)
    if not found and engine == "vllm":
        pairs = tuple(environment.items())
        found = [_with_arguments("vllm", ("vllm", "serve"), words, pairs)]
    for command in found:
        yield replace(command, container=container)


def _is_compose(text: str) -> bool:
    return re.search(r"^services:\s*$", text, re.MULTILINE) is not None


def _of_compose(text: str) -> Iterator[Command]:
    import yaml  # only for this format

    try:
        document = yaml.safe_load(text)
        services = dict(document["services"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise LaunchError(f"the compose file cannot be read: {error}.") from None
    for name, service in services.items():
        if not isinstance(service, dict):
            continue
        container = Container(
            "compose",
            _interpolate(str(service.get("image", ""))),
            (("--privileged", None),) if service.get("privileged") else (),
            document,
            str(name),
        )
        words = [*_words(service.get("entrypoint")), *_words(service.get("command"))]
        yield from _inside(container, words, _environment(service.get("environment")))


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        return [word for words in commands(_interpolate(value), {}) for word in words]
    if isinstance(value, list):
        return [_interpolate(str(word)) for word in value]
    return []


def _environment(value: object) -> dict[str, str]:
    if isinstance(value, dict):
        items: Iterable[tuple[str, object]] = value.items()
    elif isinstance(value, list):
        split = [str(entry).partition("=") for entry in value]
        items = [(name, content) for name, _, content in split]
    else:
        items = []
    return {name: _interpolate("" if content is None else str(content)) for name, content in items}


def _interpolate(text: str) -> str:
    """Compose's own variables: defaults are taken, ``$$`` is a dollar sign."""
    text = re.sub(r"\$\{[A-Za-z_]\w*:?-([^}]*)\}", r"\1", text)
    return text.replace("$$", "$")
