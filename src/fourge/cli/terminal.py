"""A conversation in the terminal: questions, commands, answers as they come."""

import sys
import time
from typing import Any

from rich.console import Console

from fourge.cli.show import say
from fourge.errors import FourgeError
from fourge.serve.client import ChatClient, Turn

HELP = """\
/system TEXT   set the system message (without TEXT: show it)
/reset         forget the conversation, keep the system message
/history       show the conversation
/help          this list
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Conversation:
    """Questions, answers, and what was said before."""

    def __init__(self, client: ChatClient, system: str | None, options: dict[str, Any]) -> None:
        self._client, self._system, self._options = client, system, options
        self._messages: list[dict[str, Any]] = []
        self._answers = Console(highlight=False)
        # In a pipe, stdout has the answers alone.
        self._thoughts = self._answers if sys.stdout.isatty() else Console(stderr=True)

    def run(self) -> None:
        """Until the end of the input."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                say("")
                continue
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(*line.partition(" ")[::2])
            elif line:
                self._ask(line)

    def _command(self, name: str, text: str) -> None:
        if name == "/reset":
            self._messages = []
            say("the conversation is forgotten")
        elif name == "/system":
            self._system = text.strip() or self._system
            say(f"system: {self._system or 'none'}")
        elif name == "/history":
            for message in self._with_system():
                say(f"{message['role']}: {message['content']}")
        else:
            say(HELP if name == "/help" else f"{name} is no command:\n{HELP}")

    def _ask(self, question: str) -> None:
        """One turn. What was refused or broke off does not stay in the conversation; what was
        stopped does."""
        asked = [*self._messages, {"role": "user", "content": question}]
        begun = time.monotonic()
        turn, shown = Turn(), ""
        try:
            messages = [*self._with_system(), asked[-1]]
            for kind, text in self._client.ask(messages, self._options, turn):
                if kind != shown and shown:
                    self._show("\n\n" if kind != "end" else "\n", shown)
                shown = kind
                self._show(text, kind)
        except KeyboardInterrupt:
            self._show("\n", shown)
            say("stopped")
        except FourgeError as error:
            self._show("\n" if shown else "", shown)
            say(str(error))
            return
        self._messages = [*asked, turn.message()]
        say(_figures(turn, time.monotonic() - begun))

    def _show(self, text: str, kind: str) -> None:
        """Text as it comes; everything but the content dimmed."""
        console = self._answers if kind in ("content", "end") else self._thoughts
        style = None if kind in ("content", "end") else "dim"
        console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
        console.file.flush()

    def _with_system(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages]


def _figures(turn: Turn, seconds: float) -> str:
    parts = [turn.finish_reason or "stopped"]
    if turn.usage:
        tokens = turn.usage["completion_tokens"]
        parts.append(f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} a second")
    speculation = (turn.metrics or {}).get("speculative_decoding")
    if speculation:
        parts.append(f"{speculation['mean_acceptance_length']:.2f} tokens a step")
    return f"[{', '.join(parts)}]"
