"""What options an engine's release has, and what they take: catalogues/, one file per release.

Names are exact: argparse would take a unique prefix of a name, until a release adds another option
with the same prefix. scripts/make_catalogue.py writes the files from an installed engine.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fourge.errors import LaunchError

CATALOGUES = Path(__file__).parent / "catalogues"
_SIZE = re.compile(r"-?\d+(\.\d+)?[kKmMgGtT]?|auto")
# Strings for SGLang's parser, JSON for what reads them.
JSON_TEXTS = frozenset({"--json-model-override-args", "--model-loader-extra-config"})
_PLUGINS = {
    "--tool-call-parser": "--tool-parser-plugin",
    "--reasoning-parser": "--reasoning-parser-plugin",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One option. ``kind``: flag, bool (a flag with a negation), int, size, float, json, str."""

    flag: str
    aliases: tuple[str, ...]
    kind: str
    choices: tuple[str, ...] | None
    default: Any
    many: bool = False
    optional_value: bool = False

    @property
    def takes_value(self) -> bool:
        return self.kind not in ("flag", "bool")

    def negates(self, name: str) -> bool:
        """Whether ``name``, one of the option's, turns it off: --no-x, or enable for disable."""
        inverse = {"--enable-": "--disable-", "--disable-": "--enable-"}.get(
            self.flag[: self.flag.find("-", 2) + 1], "--no-"
        )
        return name != self.flag and name.replace("_", "-").startswith(("--no-", inverse))


@dataclass(frozen=True, slots=True)
class Catalogue:
    """A release: options by every name that they have, variables, values of free strings."""

    engine: str
    version: str
    specs: dict[str, Spec]
    environment: frozenset[str]
    values: dict[str, tuple[str, ...]]
    keys: dict[str, dict[str, list[str] | None]]

    def find(self, name: str) -> Spec | None:
        """The option called ``name``; vLLM reads underscores in names as dashes."""
        if self.engine == "vllm" and name.startswith("--"):
            name = name.replace("_", "-")
        return self.specs.get(name)

    def prefixed(self, name: str) -> list[str]:
        """Options that ``name`` abbreviates."""
        found = {spec.flag for full, spec in self.specs.items() if full.startswith(name)}
        return sorted(found) if name.startswith("--") else []

    def nearest(self, name: str) -> str | None:
        close = difflib.get_close_matches(name, self.specs, n=1, cutoff=0.8)
        return close[0] if close else None

    def fault(self, spec: Spec, values: Sequence[str], given: frozenset[str]) -> str | None:
        """What is wrong with the values of an option, or None. ``given``: all options' names."""
        if not spec.takes_value:
            return f"it takes no value, {values[0]!r} is given" if values else None
        if not values:
            return None if spec.optional_value or spec.many else "it needs a value"
        if len(values) > 1 and not spec.many:
            return f"it takes one value, {len(values)} are given: {' '.join(values[:3])}"
        for value in values:
            found = self._value_fault(spec, value, given)
            if found is not None:
                return found
        return None

    def _value_fault(self, spec: Spec, value: str, given: frozenset[str]) -> str | None:
        if spec.choices is not None and value not in spec.choices:
            return f"{value!r} is none of its choices ({_some(spec.choices, value)})"
        allowed = self.values.get(spec.flag)
        if allowed is not None and _PLUGINS.get(spec.flag) not in given and value not in allowed:
            return (
                f"{value!r} is none of what {self.engine} {self.version} knows"
                f" ({_some(allowed, value)})"
            )
        if is_json(spec):
            return self._json_fault(spec, value)
        if not _is_a(spec.kind, value):
            return f"{value!r} is no {'number' if spec.kind != 'int' else 'whole number'}"
        return None

    def _json_fault(self, spec: Spec, text: str) -> str | None:
        try:
            value = json.loads(text)
        except ValueError as error:
            return f"it is no JSON ({error})"
        known = self.keys.get(spec.flag)
        if known is None or not isinstance(value, dict):
            return None
        for key, content in value.items():
            if key not in known:
                return f"its key {key!r} is not known ({_some(tuple(known), key)})"
            choices = known[key]
            if choices is not None and content is not None and str(content) not in choices:
                shown = _some(choices, str(content))
                return f"{key} {content!r} is none of its choices ({shown})"
        return None


def is_json(spec: Spec) -> bool:
    """Whether its value is JSON, for the parser or for what reads it later."""
    return spec.kind == "json" or spec.flag in JSON_TEXTS


def _is_a(kind: str, value: str) -> bool:
    if kind == "str":
        return True
    if kind == "size":
        return _SIZE.fullmatch(value) is not None
    try:
        int(value) if kind == "int" else float(value)
    except ValueError:
        return False
    return True


def _some(choices: Sequence[str], wanted: str) -> str:
    """All of a few choices; of many, the nearest ones and how many there are."""
    if len(choices) <= 10:
        return ", ".join(choices)
    close = difflib.get_close_matches(wanted, choices, n=3, cutoff=0.3) or list(choices[:3])
    return f"{', '.join(close)} and {len(choices) - len(close)} others"


def versions(engine: str) -> list[str]:
    """The releases of ``engine`` that there are catalogues of, the newest last."""
    names = [path.stem.partition("-")[2] for path in CATALOGUES.glob(f"{engine}-*.json")]
    return sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])


@cache
def load(engine: str, version: str | None = None) -> Catalogue:
    """The catalogue of a release, the newest by default. Raises LaunchError if there is none."""
    known = versions(engine)
    chosen = (version or known[-1]).removeprefix("v")
    if chosen not in known:
        raise LaunchError(
            f"there is no catalogue of {engine} {chosen}, but of {', '.join(known)}; choose one of"
            " them, or write one with scripts/make_catalogue.py."
        )
    raw = json.loads((CATALOGUES / f"{engine}-{chosen}.json").read_bytes())
    specs: dict[str, Spec] = {}
    for entry in raw["options"]:
        aliases, choices = tuple(entry.pop("aliases")), entry.pop("choices")
        spec = Spec(aliases=aliases, choices=tuple(choices) if choices else None, **entry)
        specs |= dict.fromkeys((spec.flag, *aliases), spec)
    return Catalogue(
        engine=engine,
        version=chosen,
        specs=specs,
        environment=frozenset(raw["environment"]),
        values={flag: tuple(values) for flag, values in raw["values"].items()},
        keys=raw["keys"],
    )
