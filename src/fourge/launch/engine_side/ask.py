"""Run by the Python of an engine's own environment: does its parser take these words?

    PYTHON ask.py vllm|sglang < commands.json

Imports no fourge and needs no GPU. Reads a JSON list of commands, each a list of words without the
program, and prints {"version": ..., "problems": [[...], ...]}, a list for each command. Names are
exact. For vLLM the parser is not enough: it takes any string for what config objects check later,
so those are asked too.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import sys
import typing


def vllm_problems(words: list[str]) -> list[str]:
    parser_class = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser
    try:
        module = importlib.import_module("vllm.entrypoints.common.cli_args")
    except ImportError:  # where it was until 0.30
        module = importlib.import_module("vllm.entrypoints.openai.cli_args")
    parser = module.make_arg_parser(parser_class(allow_abbrev=False))
    args, problems = parse(parser, words)
    if args is None:
        return problems
    config = importlib.import_module("vllm.config")
    loaders = importlib.import_module("vllm.model_executor.model_loader")
    asked = [
        ("arguments", lambda: module.validate_parsed_serve_args(args)),
        ("--attention-backend", lambda: config.AttentionConfig(backend=args.attention_backend)),
        ("--kv-cache-dtype", lambda: config.CacheConfig(cache_dtype=args.kv_cache_dtype)),
        ("--load-format", lambda: known(loaders._LOAD_FORMAT_TO_MODEL_LOADER, args.load_format)),
    ]
    for name, ask in asked:
        try:
            ask()
        except Exception as error:
            problems.append(f"{name}: {brief(error)}")
    return problems + speculative_problems(config.SpeculativeConfig, args.speculative_config)


def speculative_problems(config_class: typing.Any, given: typing.Any) -> list[str]:
    """Each key for itself, since the whole needs the model's config."""
    adapter = importlib.import_module("pydantic").TypeAdapter
    hints = typing.get_type_hints(config_class)
    problems = []
    for key, value in (given or {}).items():
        try:
            adapter(hints[key]).validate_python(value)
        except KeyError:
            problems.append(f"--speculative-config: no key {key}")
        except Exception as error:
            problems.append(f"--speculative-config {key}: {brief(error)}")
    return problems


def brief(error: Exception) -> str:
    """The first lines of an error, on one; pydantic adds where to read about its own."""
    lines = [line.strip() for line in str(error).splitlines() if "pydantic.dev" not in line]
    text = " ".join(lines)
    return text if len(text) <= 240 else text[:240] + "..."


def known(table: typing.Container[str], name: str) -> None:
    if name not in table:
        raise ValueError(f"{name!r} is not known")


def sglang_problems(words: list[str]) -> list[str]:
    server_args = importlib.import_module("sglang.srt.server_args").ServerArgs
    parser = argparse.ArgumentParser(allow_abbrev=False)
    server_args.add_cli_args(parser)
    args, problems = parse(parser, words)
    for name in ("json_model_override_args", "model_loader_extra_config"):
        text = getattr(args, name, None)
        try:
            json.loads(text or "{}")
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return problems


def parse(
    parser: argparse.ArgumentParser, words: list[str]
) -> tuple[argparse.Namespace | None, list[str]]:
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return parser.parse_args(words), []
    except SystemExit:
        lines = [line for line in told.getvalue().splitlines() if "error:" in line]
        return None, [line.partition("error: ")[2] for line in lines] or ["the parser refuses"]


def main() -> None:
    engine = sys.argv[1]
    commands = json.load(sys.stdin)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # engines print while they are imported
        ask = {"vllm": vllm_problems, "sglang": sglang_problems}[engine]
        problems = [ask(words) for words in commands]
    json.dump({"version": importlib.metadata.version(engine), "problems": problems}, answers)


if __name__ == "__main__":
    main()
