"""Write a catalogue of an installed engine's options, as src/fourge/launch/catalogues/ holds them.

    ENGINE_PYTHON scripts/make_catalogue.py vllm|sglang > ENGINE-VERSION.json

Run by the Python that has the engine; imports no fourge and needs no GPU (for vLLM without one,
set VLLM_TARGET_DEVICE=cpu). What an option takes is found by trying its converter on short texts,
so that no knowledge of the engine's own type functions is needed. An engine's free strings that
its config objects check later are listed under "values", keys of JSON options under "keys".
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import sys
import typing

JsonObject = dict[str, typing.Any]


def vllm_parser() -> argparse.ArgumentParser:
    try:
        module = importlib.import_module("vllm.entrypoints.common.cli_args")
    except ImportError:  # where it was until 0.30
        module = importlib.import_module("vllm.entrypoints.openai.cli_args")
    parsers = importlib.import_module("vllm.utils.argparse_utils")
    return module.make_arg_parser(parsers.FlexibleArgumentParser())


def sglang_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return parser


def option(action: argparse.Action, names: list[str]) -> JsonObject:
    """One line of the catalogue. ``names``: all that the parser takes, hidden ones too."""
    flag = next((name for name in action.option_strings if name.startswith("--")), names[0])
    aliases = [name for name in names if name != flag]
    default = action.default
    entry: JsonObject = {
        "flag": flag,
        "aliases": aliases,
        "kind": kind(action),
        "choices": sorted(map(str, action.choices)) if action.choices else None,
        "default": None if default in (None, argparse.SUPPRESS) else plain(default),
    }
    if action.nargs in ("+", "*"):
        entry["many"] = True
    if action.nargs == "?":
        entry["optional_value"] = True
    return entry


def plain(value: object) -> object:
    """A default as JSON can hold it; what depends on the platform is told by its text."""
    if isinstance(value, bool | int | float | str):
        return value
    return str(value)


def kind(action: argparse.Action) -> str:
    """What one value of the option is: flag, bool, int, size, float, json or str."""
    if action.nargs == 0:
        pair = isinstance(action, argparse.BooleanOptionalAction) and len(action.option_strings) > 1
        return "bool" if pair else "flag"
    if action.choices:
        return "str"
    convert = action.type if callable(action.type) else str

    def gives(text: str) -> object:
        try:
            return convert(text)
        except Exception:
            return None

    if any(not isinstance(gives(text), str | None) for text in ('{"a": 1}', "{}")):
        return "json"
    if isinstance(gives("x"), str) or gives("7") is None:
        return "str"
    if isinstance(gives("1.5"), float):
        return "float"
    return "size" if gives("1k") else "int"


def vllm_extras() -> JsonObject:
    """What vLLM checks in its config objects, and the environment variables that it reads."""
    attention = importlib.import_module("vllm.v1.attention.backends.registry")
    cache = importlib.import_module("vllm.config.cache")
    loaders = importlib.import_module("vllm.model_executor.model_loader")
    speculative = importlib.import_module("vllm.config.speculative").SpeculativeConfig
    tools = importlib.import_module("vllm.tool_parsers").ToolParserManager
    reasoning = importlib.import_module("vllm.reasoning").ReasoningParserManager
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    hints = typing.get_type_hints(speculative)
    return {
        "environment": sorted(importlib.import_module("vllm.envs").environment_variables),
        "values": {
            "--attention-backend": sorted(attention.AttentionBackendEnum.__members__),
            "--kv-cache-dtype": sorted(map(str, typing.get_args(cache.CacheDType))),
            "--load-format": sorted(loaders._LOAD_FORMAT_TO_MODEL_LOADER),
            "--quantization": sorted(quantization.QUANTIZATION_METHODS),
            "--reasoning-parser": sorted(reasoning.list_registered()),
            "--tool-call-parser": sorted(tools.list_registered()),
        },
        "keys": {
            "--speculative-config": {
                name: literals(hints[name]) for name in sorted(speculative.__dataclass_fields__)
            }
        },
    }


def literals(hint: object) -> list[str] | None:
    """The strings that a type allows; None if it allows any."""
    found: set[str] = set()
    free = False
    pending = [hint]
    while pending:
        one = pending.pop()
        if typing.get_origin(one) is typing.Literal:
            found |= {str(value) for value in typing.get_args(one)}
        elif typing.get_origin(one) in (typing.Union, type(int | str), typing.Annotated):
            pending += typing.get_args(one)
        elif hasattr(one, "__members__"):
            found |= set(one.__members__)
        elif one is not type(None):
            free = True
    return sorted(found) if found and not free else None


def sglang_extras() -> JsonObject:
    envs = importlib.import_module("sglang.srt.environ").Envs
    names = {name for name in vars(envs) if name.isupper()}
    return {"environment": sorted(names), "values": {}, "keys": {}}


def main() -> None:
    engine = sys.argv[1] if len(sys.argv) == 2 else ""
    if engine not in ("vllm", "sglang"):
        sys.exit(f"usage: {sys.argv[0]} vllm|sglang")
    parser, extras = {
        "vllm": (vllm_parser, vllm_extras),
        "sglang": (sglang_parser, sglang_extras),
    }[engine]
    names: dict[argparse.Action, list[str]] = {}
    for name, action in parser()._option_string_actions.items():
        if action.dest != "help":
            names.setdefault(action, []).append(name)
    options = sorted(itertools.starmap(option, names.items()), key=lambda entry: entry["flag"])
    rest = extras()
    lines = ",\n".join(json.dumps(entry) for entry in options)
    version = importlib.metadata.version(engine)
    print(f'{{"engine": "{engine}", "version": "{version}", "options": [\n{lines}\n],')
    print(f'"environment": {json.dumps(rest["environment"])},')
    print(f'"values": {json.dumps(rest["values"])},')
    print(f'"keys": {json.dumps(rest["keys"])}}}')


if __name__ == "__main__":
    main()
