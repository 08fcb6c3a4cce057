"""A command as text again: in the form in which it was read, or as a list of words."""

import re
import shlex
from typing import Any

from fourge.launch.command import Command


def text(command: Command) -> str:
    """Shell exports and a command, ``docker run``, or a compose file."""
    if command.container is None:
        lines = [f"export {name}={quote(value)}" for name, value in command.environment]
        return "\n".join([*lines, _lines(_head(command), command)])
    if command.container.program == "compose":
        return _compose(command)
    container = command.container
    first = [f"{container.program} run"]
    for flag, value in container.options:
        first.append(flag if value is None else f"{flag} {quote(value)}")
    first += [f"-e {quote(f'{name}={value}')}" for name, value in command.environment]
    first.append(f"--entrypoint {command.program[0]}")
    first.append(container.image)
    inside = " ".join(map(quote, _head(command)[1:]))
    return " \\\n  ".join([*first, inside, *_options(command)])


def words(command: Command) -> list[str]:
    """The engine's command line."""
    return [*_head(command), *(word for one in command.arguments for word in one.words)]


def _head(command: Command) -> list[str]:
    return [*command.program, *([command.model] if command.model else [])]


def _options(command: Command) -> list[str]:
    return [" ".join(map(quote, one.words)) for one in command.arguments]


def _lines(head: list[str], command: Command) -> str:
    return " \\\n  ".join([" ".join(map(quote, head)), *_options(command)])


def quote(word: str) -> str:
    """For a shell; a leading ~/ and variables that were not resolved keep their meaning."""
    if re.fullmatch(r"~/[\w@%+=:,./-]*", word):
        return word
    if re.search(r"\$(\w|\{|\()", word) and not re.search(r"[\"`\\]", word):
        return f'"{word}"'
    return shlex.quote(word)


def _compose(command: Command) -> str:
    import yaml  # only for this format

    assert command.container is not None
    document: dict[str, Any] = command.container.document
    service = dict(document["services"][command.container.service])
    if ("--privileged", None) not in command.container.options:
        service.pop("privileged", None)
    program, *rest = words(command)
    service |= {
        "image": command.container.image,
        "entrypoint": [program],
        "command": [word.replace("$", "$$") for word in rest],
    }
    if command.environment:
        service["environment"] = {
            name: value.replace("$", "$$") for name, value in command.environment
        }
    else:
        service.pop("environment", None)
    services = {**document["services"], command.container.service: service}
    return yaml.safe_dump({**document, "services": services}, sort_keys=False, width=10_000).rstrip(
        "\n"
    )
