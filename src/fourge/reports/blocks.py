"""What a page is made of. Blocks hold text as it is; the templates escape it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

Tone = Literal["plain", "good", "warn", "bad", "soft"]


@dataclass(frozen=True)
class Tile:
    """A headline figure; ``detail`` in smaller letters. A soft tone: it was not measured."""

    title: str
    value: str
    detail: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Missing:
    """Something that was not measured, and the command that would."""

    kind: ClassVar[str] = "missing"
    what: str
    command: str


@dataclass(frozen=True)
class Table:
    """The first column is text; others are numbers unless named in ``text_columns``."""

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    text_columns: frozenset[str] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A plotly figure as JSON; ``words`` say what it shows to those who do not see it."""

    kind: ClassVar[str] = "chart"
    title: str
    words: str
    figure: str
    height: int


@dataclass(frozen=True)
class Bar:
    """A stacked bar: (colour number, per cent of the longest bar)."""

    title: str
    value: str
    parts: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sizes:
    """Stacked bars over a table whose first column carries the colours."""

    kind: ClassVar[str] = "sizes"
    bars: tuple[Bar, ...]
    colours: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Mark:
    """A value on the scale of KL: places in per cent of its width; None: no interval."""

    title: str
    text: str
    place: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Scale:
    """The community scale, with marks: (left, width, word) of its bands, in per cent."""

    kind: ClassVar[str] = "scale"
    bands: tuple[tuple[float, float, str], ...]
    ticks: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class FindingGroup:
    """All findings of one rule: the first messages, and how many more there are."""

    kind: ClassVar[str] = "findings"
    rule: str
    severity: str
    tone: Tone
    places: str
    messages: tuple[tuple[str, str], ...]
    more: int
    remedy: str
    engines: tuple[tuple[str, str], ...]


Block = Paragraph | Missing | Table | Chart | Sizes | Scale | FindingGroup


@dataclass(frozen=True)
class Section:
    """``intro``: what one sees here, and what would be bad."""

    id: str
    title: str
    intro: str
    blocks: tuple[Block, ...]
