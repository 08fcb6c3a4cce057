"""``fourge chat``: a conversation in the terminal, with a server or with a checkpoint."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fourge.cli.show import say

_READY = "serving "

Target = Annotated[
    str, typer.Argument(metavar="URL|CHECKPOINT", help="A server's address, or a checkpoint.")
]
ServeOptions = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- OPTION...]", help="For a checkpoint: options of `fourge serve`."),
]
Model = Annotated[str | None, typer.Option(help="Default: the server's first.")]
System = Annotated[str | None, typer.Option(help="System message.")]
ApiKey = Annotated[str | None, typer.Option(envvar="FOURGE_API_KEY", help="Key of the server.")]
Temperature = Annotated[float | None, typer.Option(help="Default: the server's.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Of an answer.")]
Think = Annotated[bool, typer.Option("--think/--no-think", help="Let the model reason first.")]


def chat(
    target: Target,
    serve_options: ServeOptions = None,
    model: Model = None,
    system: System = None,
    api_key: ApiKey = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    think: Think = True,
) -> None:
    """Talk to a model: any OpenAI-compatible URL, or a checkpoint that is served meanwhile.

    Reads questions from the terminal or, line by line, from a pipe; answers go to stdout.
    """
    # httpx takes a while. Imported here so that --help stays quick.
    from fourge.cli.terminal import Conversation
    from fourge.serve.client import ChatClient

    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    if not think:
        options["chat_template_kwargs"] = {"enable_thinking": False}
    with ExitStack() as stack:
        url = target
        if not target.startswith(("http://", "https://")):
            url = stack.enter_context(_served(Path(target), serve_options or [], api_key))
        client = ChatClient(url, model=model, api_key=api_key)
        stack.callback(client.close)
        say(f"{client.model} at {url}; /help lists the commands")
        with _line_history():
            Conversation(client, system, options).run()


@contextmanager
def _served(checkpoint: Path, options: Sequence[str], api_key: str | None) -> Iterator[str]:
    """Serve the checkpoint in a process of its own, on a free port; gives its address."""
    command = [sys.executable, "-m", "fourge.cli.main", "serve", str(checkpoint), "--port", "0"]
    environment = os.environ | ({"FOURGE_API_KEY": api_key} if api_key else {})
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,  # Ctrl-C stops an answer, not the server
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith(_READY):
                break
            if not line.startswith("{"):
                say(line.rstrip())
        else:
            raise typer.Exit(process.wait())
        # Read on, so that the server never waits for a reader of its log.
        threading.Thread(target=lambda: list(process.stderr or []), daemon=True).start()
        yield line.rsplit(" ", 1)[1].strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextmanager
def _line_history() -> Iterator[None]:
    """The terminal's editing of lines, with those of earlier times."""
    if not sys.stdin.isatty():
        yield
        return
    import readline  # not on every system

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "fourge" / "chat-history"
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)
