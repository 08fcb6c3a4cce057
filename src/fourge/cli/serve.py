"""``fourge serve``: an OpenAI- and Anthropic-compatible server on the embedded engine."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fourge.cli.arguments import parse_bytes
from fourge.cli.progress import RunDisplay
from fourge.cli.show import console

Checkpoint = Annotated[Path, typer.Argument(help="Folder of the checkpoint.")]
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


def serve(
    checkpoint: Checkpoint,
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
    # Heavy: torch, fastapi. Imported here so that --help stays quick.
    from fourge.serve.limits import Limits
    from fourge.serve.run import Setup
    from fourge.serve.run import serve as run

    limits = Limits(
        max_body_bytes=max_body, max_messages=max_messages, max_choices=max_choices,
        max_waiting=max_waiting, request_timeout_s=request_timeout, drain_s=drain_timeout,
    )  # fmt: skip
    engine = {
        "device": device, "dtype": dtype, "max_model_len": model_length,
        "max_num_seqs": sequences, "max_num_batched_tokens": batched_tokens,
        "gpu_memory_utilization": utilization, "cache_tokens": cache_tokens,
        "kv_cache_dtype": cache_dtype, "enable_prefix_caching": prefix_caching,
        "num_speculative_tokens": drafts, "draft_sample_method": draft_sampling,
        "rejection_sample_method": rejection, "seed": seed,
        "hf_overrides": _object("--hf-overrides", hf_overrides),
    }  # fmt: skip
    setup = Setup(
        checkpoint=checkpoint,
        names=tuple(served_model_name or ()),
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        limits=limits,
        preferred=_object("--preferred-sampling-params", preferred),
        template_options=_object("--chat-template-kwargs", template_options),
        engine=engine,
    )
    with RunDisplay(console) as display:
        run(
            setup,
            on_progress=lambda done, total: display.scan("loading", done, total),
            on_ready=lambda url: display.note(f"serving {checkpoint} at {url}"),
        )
    display.note("stopped")


def _object(option: str, text: str | None) -> dict[str, Any]:
    """The JSON object that an option holds."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON ({error}).", param_hint=option) from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object.", param_hint=option)
    return found
