"""Strings that end a text. What may become one is held back; nothing else is.

Of several, the one whose end comes first wins, so the result is the same for every split.
"""

from collections.abc import Sequence


class StopStrings:
    """Takes text in pieces. ``found`` is the string that ended it."""

    def __init__(self, strings: Sequence[str], *, include: bool) -> None:
        self._strings = sorted(strings, key=len, reverse=True)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What is certain to be shown now; nothing after a stop was found."""
        if not self._strings or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        ends = [
            (at + len(string), string) for string in self._strings if (at := text.find(string)) >= 0
        ]
        if ends:
            end, self.found = min(ends, key=lambda one: one[0])  # of equals the longest
            self._held = ""
            return text[: end if self._include else end - len(self.found)]
        held = max(map(self._overlap, [text] * len(self._strings), self._strings))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back: text after all."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """How many characters at the end of ``text`` begin ``string``."""
        most = min(len(text), len(string) - 1)
        return next((size for size in range(most, 0, -1) if text.endswith(string[:size])), 0)
