"""Rules and findings. The catalogue is rules.toml: one entry per rule, for people to read too."""

import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).with_name("rules.toml")
SEVERITIES = ("error", "warning", "info")
ENGINES = ("vllm", "sglang", "transformers")
NAMES_SHOWN = 5
PLACES_LISTED = 100


@dataclass(frozen=True)
class Rule:
    """One entry of the catalogue; its head explains ``repair`` and ``needs``."""

    id: str
    severity: str
    title: str
    remedy: str
    repair: str
    needs: str
    engines: dict[str, str]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with all its places."""

    rule: str
    severity: str
    where: str
    count: int
    message: str
    remedy: str
    engines: dict[str, str]
    places: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``--json``."""
        return asdict(self) | {"places": list(self.places[:PLACES_LISTED])}


@cache
def rules() -> dict[str, Rule]:
    """The catalogue by id."""
    raw = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))
    return {
        id: Rule(
            id=id,
            severity=entry["severity"],
            title=entry["title"],
            remedy=entry["remedy"],
            repair=entry["repair"],
            needs=entry.get("needs", "headers"),
            engines={name: entry[name] for name in ENGINES if name in entry},
        )
        for id, entry in raw.items()
    }


def found(
    id: str,
    where: str | Iterable[str],
    message: str,
    *,
    severity: str | None = None,
    engines: Collection[str] = ENGINES,
) -> Finding:
    """A finding of rule ``id`` at one place or several; ``severity`` where it differs from the
    catalogue's, ``engines`` where not all of those that can suffer do.
    """
    rule = rules()[id]
    places = (where,) if isinstance(where, str) else tuple(where)
    return Finding(
        rule=id,
        severity=severity or rule.severity,
        where=shorten(places),
        count=len(places),
        message=message,
        remedy=rule.remedy,
        engines={name: told for name, told in rule.engines.items() if name in engines},
        places=places,
    )


def shorten(places: Sequence[str]) -> str:
    """The first few names, and how many more."""
    shown = ", ".join(places[:NAMES_SHOWN])
    more = len(places) - NAMES_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown
