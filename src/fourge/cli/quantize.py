"""``fourge quantize``: BF16 checkpoint in, NVFP4 checkpoint out."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fourge.cli.arguments import (
    AsJson,
    DeviceMemory,
    HostMemory,
    MethodChoice,
    MtpChoice,
    RecipeName,
    SourceFolder,
)
from fourge.cli.progress import RunDisplay
from fourge.cli.show import console, duration, print_json, say
from fourge.layerwise.budget import format_bytes
from fourge.quantize.recipe import load_recipe, with_overrides

InputScale = Annotated[
    Literal["layer", "expert"] | None,
    typer.Option(help="Whose largest activation an expert's input_scale comes from."),
]
InputHeadroom = Annotated[
    float | None, typer.Option(help="Factor, 1 or more, on every input_scale.")
]

WorkFolder = Annotated[
    Path | None,
    typer.Option(help="Folder for activations on the way. Default: within OUT."),
]


def quantize(
    source: SourceFolder,
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint to make.")],
    recipe: RecipeName = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[PASS=]PATH",
            help="Calibration data (JSONL, Parquet, a folder, or a dataset id) for every pass of"
            " the recipe, or for one. May be repeated.",
        ),
    ] = None,
    method: MethodChoice = None,
    mtp: MtpChoice = None,
    input_scale: InputScale = None,
    input_headroom: InputHeadroom = None,
    memory: HostMemory = None,
    device_memory: DeviceMemory = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Arithmetic of the forward pass. auto: bfloat16 where it is native."),
    ] = "auto",
    work: WorkFolder = None,
    seed: Annotated[int | None, typer.Option(help="Added to the seed of every pass.")] = None,
    max_bad_share: Annotated[
        float | None, typer.Option(help="Share of unusable records that is tolerated, 0 to 1.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Quantize the routed experts of SOURCE to NVFP4, calibrated, into OUT.

    Interrupted at any moment, the same command goes on where it was. Without --recipe, one pass
    over the files given with --data.
    """
    chosen = with_overrides(
        load_recipe(recipe or "data"),
        data=data or (),
        method=method,
        mtp=mtp,
        input_scale=input_scale,
        input_headroom=input_headroom,
        seed=seed,
        max_bad_share=max_bad_share,
    )
    # Heavy: torch, numba. Imported here so that --help and plan stay quick.
    from fourge.quantize.start import Request, run_request

    request = Request(source, out, chosen, device, dtype, memory, device_memory, work)
    with RunDisplay(console) as display:
        try:
            outcome = run_request(request, on_data=display.data, on_progress=display.run)
        except KeyboardInterrupt:
            display.note("interrupted; run the same command to go on where it was")
            raise typer.Exit(130) from None
    record = outcome.record
    if outcome.was_finished:
        say(f"{out} was already finished with this input; nothing was done")
    for warning in [*record["plan"]["warnings"], *record["data"]["warnings"]]:
        say(f"warning: {warning}")
    _show_summary(out, record)
    if json:
        print_json(record)
    if any(one["severity"] == "error" for one in record["doctor"]):
        say(f"the doctor found errors: {out} should not be served; fourge doctor {out} says more")
        raise typer.Exit(1)


def _show_summary(out: Path, record: dict) -> None:
    plan, coverage, timing = record["plan"], record["coverage"], record["timing"]
    bad = sum(one["bad"]["records"] for one in record["data"]["passes"])
    unusable = f"{bad:,} record{'s' if bad != 1 else ''} unusable"
    say(f"{out} is ready")
    say(
        f"  size      {format_bytes(plan['bytes_in'])} -> {format_bytes(plan['bytes_out'])}"
        f" in {plan['shards']} shards"
    )
    say(
        f"  data      recipe {plan['recipe']}, {record['data']['tokens']:,} tokens in"
        f" {record['data']['sequences']:,} sequences, {unusable}"
    )
    chosen = ", ".join(f"{count:,} {name}" for name, count in record["method"]["experts"].items())
    say(f"  method    {record['method']['asked']}; of the experts, {chosen}")
    say(
        f"  coverage  {coverage['min_tokens']:,} / {coverage['median_tokens']:,.0f} tokens per"
        f" expert (min / median), {coverage['never_seen']:,} of {coverage['experts']:,} experts"
        " never seen"
    )
    say(
        f"  time      {duration(timing['seconds_of_last_process'])}"
        f" ({duration(timing['seconds_of_layers'])} in layers) on {timing['device']}, peak memory"
        f" {format_bytes(timing['peak_resident_bytes'])} of"
        f" {format_bytes(timing['memory']['host_budget'])}"
    )
    told = [f"{one['severity']} {one['rule']}: {one['message']}" for one in record["doctor"]]
    for line in told or ["nothing wrong"]:
        say(f"  doctor    {line}")
    say(f"  record    {out}/fourge: run.json, coverage.json, doctor.json")
