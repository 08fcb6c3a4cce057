"""What is wrong with an existing launch command, part by part, and the command put right.

Every part gets one verdict: of the rules (rules/*.toml), else of the catalogue (name, then values),
else of its relation to the others (relations.py). Nothing is started and nothing is imported.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourge.checkpoint.metadata import read_config
from fourge.errors import FourgeError
from fourge.launch import pattern as index_pattern
from fourge.launch.catalogue import Catalogue, Spec, is_json
from fourge.launch.command import Argument, Command
from fourge.launch.relations import View, advice, relations
from fourge.launch.releases import RELEASES
from fourge.launch.rules import Finding, becomes_of, match, match_key

OVERRIDES = {"vllm": "--hf-overrides", "sglang": "--json-model-override-args"}
PREFIXES = {"vllm": ("VLLM_",), "sglang": ("SGLANG_", "SGL_")}
BROKEN = (
    "something follows the backslash, so the shell ends the command there and drops the options of"
    " the next lines; a comment needs a line of its own, before the command"
)
TRADE = "the pattern trades quality for speed and was not part of the model's training"
# Worth saying even where they are the default.
SPELLED_OUT = ("--host", "--port", "--node-rank")
MOST_ROUNDS = 4
# Families whose published models have a sharing of their own.
TRAINED_NAME = re.compile(r"glm-?5\.[2-9]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Review:
    """Findings in the order of the command, sentences of advice, and the command put right, for
    one release of the engine.
    """

    command: Command
    version: str
    findings: tuple[Finding, ...]
    advice: tuple[str, ...]
    corrected: Command

    @property
    def needs_change(self) -> bool:
        return any(finding.needs_change for finding in self.findings)


def review(command: Command, catalogue: Catalogue, family: int | None = None) -> Review:
    """Look at every part. ``family``: the GPUs' architecture (90, 100, 120) where it is known."""
    findings = _findings(command, catalogue, family)
    corrected = _corrected(command, findings)
    for _ in range(MOST_ROUNDS):  # what was put right may be wrong together
        again = _findings(corrected, catalogue, family)
        if not any(finding.needs_change for finding in again):
            break
        corrected = _corrected(corrected, again)
    return Review(
        command=command,
        version=catalogue.version,
        findings=tuple(findings),
        advice=tuple(advice(_view(command, catalogue, family))),
        corrected=corrected,
    )


def _view(command: Command, catalogue: Catalogue, family: int | None) -> View:
    return View(command, catalogue, family or _family(command), _config(command))


def _findings(command: Command, catalogue: Catalogue, family: int | None) -> list[Finding]:
    view = _view(command, catalogue, family)
    broken = [
        Finding("text", f"line {line}", "", "invalid", BROKEN) for line in command.broken_lines
    ]
    findings = [*broken, *_variables(view), *_container(view), *_arguments(view)]
    return _overruled(findings, list(relations(view, findings)))


def _family(command: Command) -> int | None:
    """The architecture that the environment speaks of."""
    found = re.fullmatch(r"sm_(\d+)a?f?", dict(command.environment).get("CUTE_DSL_ARCH", ""))
    return int(found[1]) // 10 * 10 if found else None


def _config(command: Command) -> dict[str, Any] | None:
    """config.json of the model, where the command names a folder that is here."""
    named = [command.model or ""]
    named += [
        value
        for argument in command.arguments
        for value in argument.values
        if argument.flag in ("--model", "--model-path")
    ]
    for folder in filter(None, named):
        if Path(folder).is_dir():
            try:
                return read_config(Path(folder))[1]
            except FourgeError:
                return None
    return None


def _overruled(findings: list[Finding], others: list[Finding]) -> list[Finding]:
    """Findings of relations take the place of milder ones about the same part."""
    result = list(findings)
    for other in others:
        places = [
            number
            for number, old in enumerate(result)
            if (old.kind, old.name) == (other.kind, other.name) and not old.needs_change
        ]
        if places:
            result[places[-1]] = other
        elif not any((old.kind, old.name) == (other.kind, other.name) for old in result):
            result.append(other)
    return result


# -- environment and container --------------------------------------------------------------------


def _variables(view: View) -> Iterator[Finding]:
    engine = view.command.engine
    given = {value for argument in view.command.arguments for value in argument.values}
    for name, value in view.command.environment:
        found = match(engine, "variable", name, value)
        if found is None and value in given and value[:1] in ("{", "["):
            reason = "it only carries the text of an option, which stands there itself now"
            found = Finding("variable", name, value, "redundant", reason, ())
        unread = name.startswith(PREFIXES[engine]) and name not in view.catalogue.environment
        if found is None and unread:
            reason = f"{engine} {view.catalogue.version} reads no variable of that name"
            found = Finding("variable", name, value, "ignored", reason, ())
        yield found or Finding("variable", name, value, "kept", "")


def _container(view: View) -> Iterator[Finding]:
    container = view.command.container
    if container is None:
        return
    engine = view.command.engine
    image = match(engine, "container", "image", container.image)
    if image is not None:
        yield replace(image, becomes=(RELEASES[engine].image,))
    else:
        yield Finding("container", "image", container.image, "kept", "")
    environment = dict(view.command.environment)
    for flag, value in container.options:
        found = match(engine, "container", flag, value or "")
        mounted = (value or "").split(":")
        if flag in ("-v", "--volume") and environment.get("NCCL_GRAPH_FILE") in mounted[1:2]:
            reason = "it only brought the file of NCCL_GRAPH_FILE in"
            found = Finding("container", flag, value or "", "redundant", reason, ())
        yield found or Finding("container", flag, value or "", "kept", "")


# -- options --------------------------------------------------------------------------------------


def _arguments(view: View) -> Iterator[Finding]:
    arguments = view.command.arguments
    for number, argument in enumerate(arguments):
        later = {view.canonical(other.flag) for other in arguments[number + 1 :]}
        if view.canonical(argument.flag) in later and "." not in argument.flag:
            reason = "given again further on, and the last one counts"
            yield _finding(argument, "redundant", reason, ())
        else:
            yield _argument(view, argument)
    for word in view.command.strays:
        yield Finding("option", word, "", "invalid", "a word that belongs to no option", ())


def _finding(
    argument: Argument, verdict: str, reason: str, becomes: tuple[str, ...] | None = None
) -> Finding:
    value = " ".join(argument.values)
    return Finding("option", argument.flag, value, verdict, reason, becomes)


def _argument(view: View, argument: Argument) -> Finding:
    base, dot, path = argument.flag.partition(".")
    spec = view.catalogue.find(base if dot else argument.flag)
    if dot and spec is not None and spec.kind == "json":
        return _dotted(view, argument, spec, path)
    value = " ".join(argument.values)
    name = argument.flag if spec is None or spec.negates(argument.flag) else spec.flag
    ruled = match(view.command.engine, "option", name, value)
    if ruled is not None and ruled.verdict != "kept":
        return replace(ruled, name=argument.flag)
    if spec is None:
        return _unknown(view, argument)
    if is_json(spec) and (found := _json(view, argument, spec)) is not None:
        return found
    fault = view.catalogue.fault(spec, argument.values, view.names)
    if fault is not None:
        becomes = () if spec.takes_value else (argument.flag,)
        return _finding(argument, "invalid", fault, becomes)
    if _is_default(spec, argument):
        return _finding(argument, "redundant", "this is the default", ())
    return _finding(argument, "kept", ruled.reason if ruled else "")


def _unknown(view: View, argument: Argument) -> Finding:
    catalogue = view.catalogue
    release = f"{catalogue.engine} {catalogue.version}"
    full = catalogue.prefixed(argument.flag)
    if len(full) == 1:
        reason = f"an abbreviation of {full[0]}, which the next release may make ambiguous"
        return _finding(argument, "invalid", reason, (full[0], *argument.values))
    if full:
        reason = f"an ambiguous abbreviation: it may mean {', '.join(full[:4])}"
        return _finding(argument, "invalid", reason, ())
    near = catalogue.nearest(argument.flag)
    reason = f"{release} has no such option" + (f"; the nearest is {near}" if near else "")
    return _finding(argument, "invalid", reason, ())


def _is_default(spec: Spec, argument: Argument) -> bool:
    if spec.flag in SPELLED_OUT or is_json(spec) or spec.default is None:
        return False
    if len(argument.values) > 1:
        return False
    if not spec.takes_value:
        return spec.kind == "bool" and spec.default is not spec.negates(argument.flag)
    given = argument.values[0] if argument.values else ""
    try:
        return float(given) == float(spec.default)
    except ValueError:
        return given == str(spec.default)


def _dotted(view: View, argument: Argument, spec: Spec, path: str) -> Finding:
    """``--speculative-config.method mtp``: one key of an option's JSON (vLLM)."""
    key = path.split(".")[0].rstrip("+")  # a + appends to a list
    text = " ".join(argument.values)
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    rule = match_key(view.command.engine, spec.flag, key, str(content))
    if rule is not None:
        new = becomes_of(rule, str(content))
        words = (argument.flag, *new) if new else new
        reason = rule.reason.replace("{value}", str(content))
        return _finding(argument, rule.verdict, reason, words)
    value = content if path == key else {}
    fault = view.catalogue.fault(spec, (json.dumps({key: value}),), view.names)
    if fault is not None and (path == key or "is not known" in fault):
        return _finding(argument, "invalid", fault, ())
    return _finding(argument, "kept", "")


def _json(view: View, argument: Argument, spec: Spec) -> Finding | None:
    """What is to be said of the keys of an option's JSON; None if nothing is."""
    try:
        content = json.loads(argument.values[0]) if len(argument.values) == 1 else None
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    if spec.flag == OVERRIDES[view.command.engine] and (
        "index_topk_pattern" in content or "indexer_types" in content
    ):
        return _pattern(view, argument, content)
    verdict, reasons, fixed = "kept", [], dict(content)
    for key, value in content.items():
        rule = match_key(view.command.engine, spec.flag, key, str(value))
        if rule is not None:
            new = becomes_of(rule, str(value))
            verdict = rule.verdict
            reasons.append(rule.reason.replace("{value}", str(value)))
            if new:
                fixed[key] = new[0]
            elif new is not None:
                fixed.pop(key)
    for key in list(fixed):
        fault = view.catalogue.fault(spec, (json.dumps({key: fixed[key]}),), view.names)
        if fault is not None:
            verdict = "invalid"
            reasons.append(fault)
            fixed.pop(key)
    if not reasons:
        return None
    becomes = (argument.flag, _dump(fixed)) if fixed else ()
    return _finding(argument, verdict, "; ".join(reasons), becomes)


def _pattern(view: View, argument: Argument, content: dict[str, Any]) -> Finding:
    """An override of the index pattern, in the form that the engine reads."""
    rest = {
        key: value
        for key, value in content.items()
        if key not in ("index_topk_pattern", "indexer_types")
    }
    without = (argument.flag, _dump(rest)) if rest else ()
    pattern = content.get("index_topk_pattern")
    types = content.get("indexer_types")
    if pattern is None and isinstance(types, list):
        pattern = "".join({"full": "F", "shared": "S"}.get(str(kind), "?") for kind in types)
    if pattern is None:
        return _finding(argument, "kept", "")
    raw = view.config or {}
    layers = raw.get("num_hidden_layers", index_pattern.GLM_LAYERS)
    key = index_pattern.trained(raw)
    if key is None and TRAINED_NAME.search(view.model):
        key = "indexer_types"
    if key is not None:
        reason = f"the model was trained with a sharing of its own ({key}); another has no weights"
        return _finding(argument, "invalid", reason, without)
    fault = index_pattern.fault(pattern, layers)
    if fault is not None:
        return _finding(argument, "invalid", f"the index pattern cannot be used: {fault}", without)
    fixed = (argument.flag, _dump(rest | index_pattern.override(pattern, layers)))
    if view.command.engine == "sglang" and types is None and "indexer_types" not in content:
        reason = (
            "SGLang reads indexer_types, which transformers has filled in, before"
            f" index_topk_pattern: this changes nothing; and {TRADE}"
        )
        return _finding(argument, "ignored", reason, fixed)
    if view.command.engine == "vllm" and content.get("index_topk_pattern") is None:
        reason = f"vLLM reads index_topk_pattern alone: this changes nothing; and {TRADE}"
        return _finding(argument, "ignored", reason, fixed)
    last = "; its last letter stands for the MTP layer" if len(pattern) > layers else ""
    return _finding(argument, "kept", TRADE + last)


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


# -- put right ------------------------------------------------------------------------------------


def _corrected(command: Command, findings: list[Finding]) -> Command:
    """The command with every finding's words in place of the old ones."""
    variables: list[tuple[str, str]] = []
    options: list[tuple[str, str | None]] = []
    words: list[str] = []
    image = command.container.image if command.container else ""
    program = command.program
    for one in findings:
        if one.kind == "variable":
            new = (f"{one.name}={one.value}",) if one.becomes is None else one.becomes
            variables += [(name, value) for name, _, value in (word.partition("=") for word in new)]
        elif one.kind == "container" and one.name == "image":
            image = one.becomes[0] if one.becomes else image
        elif one.kind == "container" and one.becomes is None:
            options.append((one.name, one.value or None))
        elif one.kind == "option" and one.becomes is not None:
            words += one.becomes
        elif one.kind == "option":
            words += _words_of(command, one)
    container = command.container
    if container is not None:
        container = replace(container, image=image, options=tuple(options))
        program = RELEASES[command.engine].program
    return replace(
        command,
        program=program,
        arguments=_grouped(words),
        environment=tuple(dict(variables).items()),
        container=container,
        strays=(),
        broken_lines=(),
    )


def _words_of(command: Command, finding: Finding) -> list[str]:
    """The words of the argument that ``finding`` is about, as they were given."""
    for argument in command.arguments:
        if (argument.flag, " ".join(argument.values)) == (finding.name, finding.value):
            return argument.words
    raise AssertionError(f"no argument {finding.name} {finding.value}")


def _grouped(words: list[str]) -> tuple[Argument, ...]:
    grouped: list[Argument] = []
    for word in words:
        if re.fullmatch(r"-{1,2}[A-Za-z][\w.+-]*", word):
            grouped.append(Argument(word, ()))
        else:
            grouped[-1] = replace(grouped[-1], values=(*grouped[-1].values, word))
    return tuple(grouped)
