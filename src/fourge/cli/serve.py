"""``fourge serve``: an OpenAI- and Anthropic-compatible server on the embedded engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fourge.cli.arguments import parse_bytes
from fourge.cli.progress import RunDisplay
from fourge.cli.show import console, say
from fourge.errors import EngineError

Checkpoint = Annotated[Path, typer.Argument(help="Folder of the checkpoint.")]
Engine = Annotated[
    Literal["embedded", "vllm", "sglang"],
    typer.Option(help="vllm and sglang are started and tested as `fourge launch --run` does."),
]
Hardware = Annotated[
    str, typer.Option(metavar="MACHINE", help="For vllm and sglang, as `fourge launch` has it.")
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="What clients call the model; may be repeated. Default: the folder's name.",
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for the whole network.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="FOURGE_API_KEY",
        help="Key that clients have to send; may be repeated. Default: none is needed.",
    ),
]
Preferred = Annotated[
    str | None,
    typer.Option(
        "--preferred-sampling-params",
        metavar="JSON",
        help="Sampling of requests that say nothing, over generation_config.json; for example"
        """ '{"temperature": 0.7}'.""",
    ),
]
TemplateOptions = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""Options of the chat template, for example '{"clear_thinking": false}'.""",
    ),
]
Drafts = Annotated[
    int,
    typer.Option("--speculative-tokens", min=0, max=8, help="Drafts of the MTP layer per step."),
]
MaxBody = Annotated[
    int, typer.Option("--max-body", metavar="SIZE", parser=parse_bytes, help="Of a request.")
]


Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Of the arithmetic. auto: float32 on the CPU, bfloat16 on a GPU."),
]
ModelLength = Annotated[
    int | None, typer.Option("--max-model-len", help="Most tokens of a request with its answer.")
]
Sequences = Annotated[int, typer.Option("--max-num-seqs", help="Answers computed at once.")]
BatchedTokens = Annotated[
    int, typer.Option("--max-num-batched-tokens", help="Most tokens of one step.")
]
Utilization = Annotated[
    float,
    typer.Option("--gpu-memory-utilization", help="Share of free memory to use, on the CPU too."),
]
CacheTokens = Annotated[int | None, typer.Option(help="Tokens that the cache holds.")]
CacheDtype = Annotated[
    Literal["auto", "bf16", "fp32", "fp8"],
    typer.Option("--kv-cache-dtype", help="auto: that of the arithmetic."),
]
PrefixCaching = Annotated[
    bool,
    typer.Option("--prefix-caching/--no-prefix-caching", help="Compute shared beginnings once."),
]
DraftSampling = Annotated[
    Literal["probabilistic", "greedy"],
    typer.Option("--draft-sample-method", help="How drafts are chosen."),
]
Rejection = Annotated[
    Literal["standard", "block"],
    typer.Option("--rejection-sample-method", help="How drafts are judged."),
]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")]
AsyncScheduling = Annotated[
    bool | None,
    typer.Option(
        "--async-scheduling/--no-async-scheduling",
        help="Launch a step before the last one's tokens are known. Default: on a GPU, no drafts.",
    ),
]
Overrides = Annotated[str | None, typer.Option(metavar="JSON", help="Over config.json.")]
Seed = Annotated[int | None, typer.Option(help="Of requests that bring none. Default: random.")]
MaxMessages = Annotated[int, typer.Option(min=1, help="Of a request.")]
MaxChoices = Annotated[int, typer.Option(min=1, help="Answers to one request (n).")]
MaxWaiting = Annotated[
    int, typer.Option(min=0, help="Answers that may wait; whoever comes then gets 429.")
]
RequestTimeout = Annotated[float, typer.Option(min=0.001, help="Seconds that an answer may take.")]
DrainTimeout = Annotated[
    float, typer.Option(min=0, help="Seconds for the requests under way when the server stops.")
]


LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
# option of the engine -> parameter of the verb
_OF_ENGINE = {
    "device": "device", "dtype": "dtype", "max_model_len": "model_length",
    "max_num_seqs": "sequences", "max_num_batched_tokens": "batched_tokens",
    "gpu_memory_utilization": "utilization", "cache_tokens": "cache_tokens",
    "kv_cache_dtype": "cache_dtype", "enable_prefix_caching": "prefix_caching",
    "enforce_eager": "enforce_eager", "async_scheduling": "async_scheduling",
    "num_speculative_tokens": "drafts", "draft_sample_method": "draft_sampling",
    "rejection_sample_method": "rejection", "seed": "seed",
}  # fmt: skip
# What another engine is told; the other options are the embedded engine's.
_HANDED_OVER = {
    "context", "checkpoint", "engine", "hardware", "served_model_name", "host", "port", "api_key",
    "model_length",
}  # fmt: skip


def serve(
    context: typer.Context,
    checkpoint: Checkpoint,
    engine: Engine = "embedded",
    hardware: Hardware = "auto",
    served_model_name: Names = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKeys = None,
    preferred: Preferred = None,
    template_options: TemplateOptions = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_length: ModelLength = None,
    sequences: Sequences = 32,
    batched_tokens: BatchedTokens = 2048,
    utilization: Utilization = 0.8,
    cache_tokens: CacheTokens = None,
    cache_dtype: CacheDtype = "auto",
    prefix_caching: PrefixCaching = True,
    drafts: Drafts = 0,
    draft_sampling: DraftSampling = "probabilistic",
    rejection: Rejection = "standard",
    enforce_eager: Eager = False,
    async_scheduling: AsyncScheduling = None,
    hf_overrides: Overrides = None,
    seed: Seed = None,
    max_body: MaxBody = 32 << 20,
    max_messages: MaxMessages = 4096,
    max_choices: MaxChoices = 16,
    max_waiting: MaxWaiting = 256,
    request_timeout: RequestTimeout = 3600,
    drain_timeout: DrainTimeout = 30,
) -> None:
    """Serve CHECKPOINT at /v1/chat/completions, /v1/messages and more; a chat page at /.

    Ctrl-C or SIGTERM ends it when the requests under way are done.
    """
    if engine != "embedded":
        _hand_over(context, engine)
        return
    _check(context, host, api_key)
    # Heavy: torch, fastapi. Imported here so that --help stays quick.
    from fourge.serve.limits import Limits
    from fourge.serve.run import Setup
    from fourge.serve.run import serve as run

    limits = Limits(
        max_body_bytes=max_body, max_messages=max_messages, max_choices=max_choices,
        max_waiting=max_waiting, request_timeout_s=request_timeout, drain_s=drain_timeout,
    )  # fmt: skip
    chosen = {name: context.params[own] for name, own in _OF_ENGINE.items()}
    setup = Setup(
        checkpoint=checkpoint,
        names=tuple(served_model_name or ()),
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        limits=limits,
        preferred=_object("--preferred-sampling-params", preferred),
        template_options=_object("--chat-template-kwargs", template_options),
        engine=chosen | {"hf_overrides": _object("--hf-overrides", hf_overrides)},
    )
    _run(run, setup, checkpoint)


def _run(run: Callable[..., None], setup: Any, checkpoint: Path) -> None:
    with RunDisplay(console) as display:
        run(
            setup,
            on_progress=lambda done, total: display.scan("loading", done, total),
            on_ready=lambda url: display.note(f"serving {checkpoint} at {url}"),
        )
    display.note("stopped")


def _check(context: typer.Context, host: str, keys: list[str] | None) -> None:
    if _is_given(context, "hardware"):
        raise EngineError("--hardware is for --engine vllm or sglang: choose one with --device.")
    if host not in LOCAL_HOSTS and not keys:
        say(f"warning: {host} is open to the network, and no --api-key is asked for")


def _hand_over(context: typer.Context, engine: Literal["vllm", "sglang"]) -> None:
    """Start another engine, with its smoke test. EngineError: an option that it has no use for."""
    from fourge.cli.launch import launch

    given = context.params
    own = [
        option
        for parameter in context.command.params
        for option in parameter.opts[:1]
        if parameter.name not in _HANDED_OVER and _is_given(context, parameter.name or "")
    ]
    names, keys = given["served_model_name"] or (), given["api_key"] or ()
    if own or len(names) > 1 or len(keys) > 1:
        what = ", ".join(own) or "one --served-model-name and one --api-key at most"
        raise EngineError(
            f"--engine {engine} and the embedded engine differ in {what}: leave it out, or make the"
            f" command with `fourge launch --engine {engine}` and change that."
        )
    launch(
        Path(given["checkpoint"]),
        engine,
        hardware=given["hardware"],
        context=given["model_length"],
        served_model_name=next(iter(names), None),
        host=given["host"],
        port=given["port"],
        api_key=next(iter(keys), None),
        run=True,
    )


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the command line has the option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _object(option: str, text: str | None) -> dict[str, Any]:
    """The JSON object that an option holds."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON ({error}).", param_hint=option) from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object.", param_hint=option)
    return found
