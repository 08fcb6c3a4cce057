"""What is said outside tool calls: reasoning up to </think>, content after it.

White space at the end of reasoning is dropped, and so is a stretch of content that is nothing else
before or after a tool call; all other text is kept as it is. Only what may have to be dropped is
held back.
"""

from fourge.chat.deltas import Delta
from fourge.chat.tags import END_THINK, STOPS, THINK, THINK_TAGS, Piece


def leaves_thinking_open(prompt: str) -> bool:
    """Whether the answer to a rendered prompt begins inside <think>.

    False where the template has closed it (thinking is off) or a message with content is continued.
    """
    turn = prompt.rpartition("<|assistant|>")[2]
    return turn.rfind(THINK) > turn.rfind(END_THINK)


class ReasoningParser:
    """Pieces outside tool calls -> reasoning and content.

    ``thinking``: the prompt has opened <think>. ``tools``: the request has tools; if it has none,
    the tags of calls are text.
    """

    def __init__(self, *, thinking: bool, tools: bool) -> None:
        self.reasoning = thinking
        self._thinking = thinking
        self._tools = tools
        self._held = ""  # white space
        self._said = False  # anything but white space since the last </think> or call
        self._called = False
        self._end_is_due = True  # one </think> closes what the prompt opened

    def take(self, piece: Piece) -> list[Delta]:
        """What the piece adds: at most one delta."""
        if piece.tag is not None and self._consume(piece):
            return []
        text = self._held + piece.text
        said = text.rstrip()
        if not self.reasoning and (self._said or said):
            said = text
        self._held = text[len(said) :]
        self._said = self._said or bool(said)
        return self._deltas(said)

    def begin_call(self) -> None:
        """A tool call begins here: reasoning is over, and white space before it is dropped."""
        self.reasoning = False
        self._held, self._said, self._called = "", False, True

    def finish(self) -> list[Delta]:
        """The end of the output; white space after a call is no content."""
        held, self._held = self._held, ""
        return [] if self._called and not self.reasoning else self._deltas(held)

    def _consume(self, piece: Piece) -> bool:
        """Whether the tag does something, or is a special token in a place that has no use for it;
        otherwise it is text that looks like a tag."""
        if piece.tag in STOPS:
            return True
        if piece.tag == END_THINK and self._closes():
            if self.reasoning:
                self._held, self._said = "", False
            self.reasoning = self._end_is_due = False
            return True
        if piece.tag == THINK and self.reasoning and not self._said:
            return True
        if piece.tag in THINK_TAGS:
            return piece.special and self._thinking
        return piece.special and self._tools

    def _closes(self) -> bool:
        """</think> ends reasoning, even if a call did so before; with thinking off, some models
        begin with one all the same."""
        return self._end_is_due and (self._thinking or not (self._said or self._called))

    def _deltas(self, text: str) -> list[Delta]:
        if not text:
            return []
        return [Delta(reasoning=text) if self.reasoning else Delta(content=text)]
