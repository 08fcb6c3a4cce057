"""The rules about options, variables and containers that no catalogue knows: rules/*.toml."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RULES = Path(__file__).parent / "rules"
VERDICTS = ("kept", "renamed", "fork-only", "ignored", "redundant", "dangerous", "invalid")
# A command with one of these has to be changed.
CHANGING = frozenset({"renamed", "fork-only", "dangerous", "invalid"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One entry; both.toml explains the fields."""

    kind: str
    name: str
    verdict: str
    reason: str
    value: str | None = None
    key: str | None = None
    becomes: tuple[str, ...] | None = None

    def matches(self, value: str) -> bool:
        return self.value is None or re.fullmatch(self.value, value, re.DOTALL) is not None


@dataclass(frozen=True, slots=True)
class Finding:
    """What is said of one part of a command. ``becomes``: the words in its place; None if it stays
    as it is, empty if it goes.
    """

    kind: str
    name: str
    value: str
    verdict: str
    reason: str
    becomes: tuple[str, ...] | None = None

    @property
    def needs_change(self) -> bool:
        return self.verdict in CHANGING or (self.verdict == "ignored" and bool(self.becomes))


@cache
def rules(engine: str) -> tuple[Rule, ...]:
    """The rules for one engine's commands, in the order in which they are tried."""
    found = []
    for path in (RULES / f"{engine}.toml", RULES / "both.toml"):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["rule"]:
            if "becomes" in entry:
                entry["becomes"] = tuple(entry["becomes"])
            found.append(Rule(**entry))
    return tuple(found)


def match(engine: str, kind: str, name: str, value: str) -> Finding | None:
    """What the first rule about this part of a command says, or None."""
    for rule in rules(engine):
        if (rule.kind, rule.name, rule.key) == (kind, name, None) and rule.matches(value):
            return apply(rule, value)
    return None


def match_key(engine: str, name: str, key: str, content: str) -> Rule | None:
    """The first rule about a key of an option's JSON, or None."""
    for rule in rules(engine):
        if (rule.kind, rule.name, rule.key) == ("option", name, key) and rule.matches(content):
            return rule
    return None


def apply(rule: Rule, value: str) -> Finding:
    """The finding of a rule about a part with this value."""
    return Finding(
        rule.kind,
        rule.name,
        value,
        rule.verdict,
        rule.reason.replace("{value}", value),
        becomes_of(rule, value),
    )


def becomes_of(rule: Rule, value: str) -> tuple[str, ...] | None:
    """What takes the place of a part that ``rule`` is about."""
    if rule.becomes is None:
        return None if rule.verdict == "kept" else ()
    return _fill(rule.becomes, value)


def _fill(words: Sequence[str], value: str) -> tuple[str, ...]:
    """Every word with {value} filled in; a value of several words becomes several."""
    filled: list[str] = []
    for word in words:
        filled += value.split(" ") if word == "{value}" else [word]
    return tuple(filled)
