"""Words of a shell script: quoting, continuations, comments, variables; no more than launch
commands use.

``commands`` gives the simple commands one by one, since each may set variables that the next uses.
Substitutions of commands, here-documents and control flow are not computed; ``$(...)`` stays as it
is, redirections are dropped.
"""

import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field

from fourge.errors import LaunchError

Variables = MutableMapping[str, str]
ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_FENCE = re.compile(r"^\s*```.*$|^\s*~~~.*$", re.MULTILINE)
_NAME = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)(?::?-([^}]*))?\})")
_PLACEHOLDER = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_. |-]*>")
# What people write and a shell does not read as they meant it: the command ends there.
BROKEN_CONTINUATION = re.compile(r"\\[ \t]+(#[^\n]*)?\n")


@dataclass
class Lexer:
    """A position in a script."""

    text: str
    variables: Variables
    position: int = 0
    word: list[str] = field(default_factory=list)
    has_word: bool = False

    def commands(self) -> Iterator[list[str]]:
        """The words of each simple command."""
        words: list[str] = []
        while self.position < len(self.text):
            ends = self._step(words)
            if ends and words:
                yield words
                words = []
        self._close(words)
        if words:
            yield words

    def _step(self, words: list[str]) -> bool:
        """Read one piece; True if the command ends here."""
        char = self.text[self.position]
        if char == "\\":
            self._escape()
        elif char == "'":
            self._take(self._until("'"))
        elif char == '"':
            self._double_quoted()
        elif char == "$":
            self._dollar(words)
        elif char in " \t\r":
            self._close(words)
            self.position += 1
        elif char in "\n;&|()":
            self._close(words)
            self.position += 1
            return True
        elif char == "#" and not self.has_word:
            end = self.text.find("\n", self.position)
            self.position = len(self.text) if end < 0 else end
        elif char in "<>":
            self._redirect(words)
        else:
            self._take(char)
            self.position += 1
        return False

    def _take(self, text: str) -> None:
        self.word.append(text)
        self.has_word = True

    def _close(self, words: list[str]) -> None:
        if self.has_word:
            words.append("".join(self.word))
        self.word, self.has_word = [], False

    def _escape(self) -> None:
        following = self.text[self.position + 1 : self.position + 2]
        self.position += 2
        if following == "\r" and self.text[self.position : self.position + 1] == "\n":
            self.position += 1
        elif following != "\n":
            self._take(following)

    def _until(self, quote: str) -> str:
        """The text up to the closing quote, which is passed."""
        end = self.text.find(quote, self.position + 1)
        if end < 0:
            raise self._unclosed(quote)
        inner = self.text[self.position + 1 : end]
        self.position = end + 1
        return inner

    def _unclosed(self, quote: str) -> LaunchError:
        line = self.text.count("\n", 0, self.position) + 1
        return LaunchError(
            f"the {quote} of line {line} is never closed; needed is a complete command."
        )

    def _double_quoted(self) -> None:
        start = self.position
        self.position += 1
        self._take("")
        while self.text[self.position : self.position + 1] != '"':
            if self.position >= len(self.text):
                self.position = start
                raise self._unclosed('"')
            char = self.text[self.position]
            following = self.text[self.position + 1 : self.position + 2]
            if char == "\\" and following in ("$", "`", '"', "\\", "\n"):
                self._take("" if following == "\n" else following)
                self.position += 2
            elif char == "$":
                self._take(self._value())
            else:
                self._take(char)
                self.position += 1
        self.position += 1

    def _dollar(self, words: list[str]) -> None:
        """An unquoted variable: its value is split into words."""
        first, *others = self._value().split(" ") or [""]
        if first:
            self._take(first)
        for part in others:
            self._close(words)
            if part:
                self._take(part)

    def _value(self) -> str:
        """What stands for the variable or substitution at this position, which is passed."""
        match = _NAME.match(self.text, self.position)
        if match:
            self.position = match.end()
            name = match[1] or match[2]
            return self.variables.get(name, match[3] if match[3] is not None else match[0])
        start = self.position
        self.position += 1
        if self.text[self.position : self.position + 1] == "(":
            depth = 0
            while self.position < len(self.text):
                depth += {"(": 1, ")": -1}.get(self.text[self.position], 0)
                self.position += 1
                if depth == 0:
                    break
        return self.text[start : self.position]

    def _redirect(self, words: list[str]) -> None:
        """``<PLACEHOLDER>`` is a word that somebody has to replace; everything else is dropped."""
        match = _PLACEHOLDER.match(self.text, self.position)
        if match:
            self._take(match[0])
            self.position = match.end()
            return
        if "".join(self.word).isdigit():
            self.word, self.has_word = [], False
        self._close(words)
        found = re.compile(r"[<>&|]+\s*[^\s;&|]*").match(self.text, self.position)
        assert found is not None
        self.position = found.end()


def commands(text: str, variables: Variables) -> Iterator[list[str]]:
    """The simple commands of a script. Raises LaunchError at an unclosed quote."""
    clean = BROKEN_CONTINUATION.sub("\\\n", _FENCE.sub("", text))
    return Lexer(clean, variables).commands()
