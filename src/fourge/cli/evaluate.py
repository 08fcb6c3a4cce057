"""``fourge evaluate``: KL divergence and perplexity of quantized checkpoints against BF16."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fourge.cli.arguments import AsJson, DeviceMemory, HostMemory
from fourge.cli.progress import RunDisplay
from fourge.cli.show import console, duration, print_json, print_table, say
from fourge.layerwise.budget import format_bytes

LANES = {"w4a16": ("w4a16",), "w4a4": ("w4a4",), "both": ("w4a16", "w4a4")}
# 40 windows of 4,096 tokens: enough for intervals, and twice as long as GLM-5.1's index_topk.
DEFAULT_CONTEXT = 4096
DEFAULT_TOKENS = 40 * DEFAULT_CONTEXT


Checkpoints = Annotated[
    list[Path], typer.Argument(metavar="CHECKPOINT...", help="Quantized checkpoints.")
]
Reference = Annotated[
    Path, typer.Option("--reference", help="Folder of the BF16 checkpoint they were made from.")
]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="[KIND=]PATH",
        help="Conversations or texts (JSONL, Parquet, a folder, or a dataset id), told apart by"
        " kind: the name of the file unless given. May be repeated.",
    ),
]
Lane = Annotated[
    Literal["w4a16", "w4a4", "both"],
    typer.Option(help="4-bit weights alone, or the experts' inputs rounded to NVFP4 as well."),
]
Tokens = Annotated[
    int, typer.Option(min=2, help="Tokens in all, shared evenly by the kinds of data.")
]
Context = Annotated[
    int, typer.Option(min=2, help="Most tokens of a window; longer records are cut there.")
]
PerExpert = Annotated[
    bool,
    typer.Option(
        "--per-expert-input-scale",
        help="Round each expert's inputs with its own input_scale, not the layer's largest.",
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float32"],
    typer.Option(
        help="Arithmetic of the candidates; the reference always computes in float32. auto:"
        " bfloat16, as engines do, on a GPU; float32 on the CPU."
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(help="Folder for activations on the way. Default: beside the record."),
]
Record = Annotated[
    Path | None,
    typer.Option(help="Folder for the record. Default: fourge/evaluation in CHECKPOINT."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the choice of windows.")]


def evaluate(
    checkpoints: Checkpoints,
    reference: Reference,
    data: Data,
    lane: Lane = "both",
    tokens: Tokens = DEFAULT_TOKENS,
    context: Context = DEFAULT_CONTEXT,
    per_expert: PerExpert = False,
    memory: HostMemory = None,
    device_memory: DeviceMemory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    work: Work = None,
    record: Record = None,
    seed: Seed = 0,
    json: AsJson = False,
) -> None:
    """Measure how far CHECKPOINT is from its BF16 reference, layer by layer in bounded memory.

    Several checkpoints are compared window by window. Interrupted at any moment, the same command
    goes on where it was.
    """
    # Heavy: torch, numba. Imported here so that --help stays quick.
    from fourge.evaluate.start import Request, run_request

    request = Request(
        checkpoints=tuple(checkpoints),
        reference=reference,
        data=tuple(data),
        lanes=LANES[lane],
        tokens=tokens,
        context=context,
        seed=seed,
        scales_of="expert" if per_expert else "layer",
        device=device,
        dtype=dtype,
        memory=memory,
        device_memory=device_memory,
        work=work,
        record=record,
    )
    with RunDisplay(console) as display:
        try:
            outcome = run_request(request, on_data=display.data, on_progress=display.run)
        except KeyboardInterrupt:
            display.note("interrupted; run the same command to go on where it was")
            raise typer.Exit(130) from None
    if outcome.was_finished:
        say("this evaluation was already done; its record is shown")
    for document, path in zip(outcome.records, outcome.paths, strict=True):
        _show(document, path)
    if json:
        several = {"candidates": outcome.records} if len(outcome.records) > 1 else {}
        print_json(outcome.records[0] | several)


def _show(document: dict, path: Path) -> None:
    receipt = document["receipt"]
    rows = [(lane, document["lanes"][lane]) for lane in document["lanes"]]
    rows.append(("floor", document["floor"]))
    perplexity = rows[0][1]["ppl_reference"]
    print_table(
        f"{receipt['checkpoint']['name']} against {receipt['reference']['name']}, KL in nats;"
        f" perplexity of the reference {perplexity:.3f}",
        ("lane", "KL mean", "95 %", "median", "p99", "max", "top-1", "ppl"),
        [
            (
                lane,
                f"{one['kl_mean']:.5f}",
                "{:.5f}-{:.5f}".format(*one["kl_mean_interval"]),
                f"{one['kl_median']:.5f}",
                f"{one['kl_p99']:.4f}",
                f"{one['kl_max']:.2f}",
                f"{one['top1']:.2%}",
                f"{one['ppl_candidate']:.3f}",
            )
            for lane, one in rows
        ],
    )
    _show_groups(document)
    for pair in document.get("paired", []):
        low, high = pair["interval"]
        verdict = "closer" if high < 0 else "farther" if low > 0 else "no difference shown"
        say(
            f"{pair['lane']}: KL {pair['difference']:+.5f} against {pair['other']}"
            f" ({low:+.5f} to {high:+.5f}, {pair['windows']} windows): {verdict}"
        )
    data = receipt["data"]
    for warning in data["warnings"]:
        say(f"warning: {warning}")
    if receipt["calibration_overlap"]:
        names = ", ".join(receipt["calibration_overlap"])
        say(f"note: this checkpoint was calibrated with {names} too")
    say(
        f"{data['tokens']:,} tokens in {data['windows']:,} windows, {duration(receipt['seconds'])}"
        f" on {receipt['device']}, peak memory {format_bytes(receipt['peak_resident_bytes'])} of"
        f" {format_bytes(receipt['memory_budget_bytes'])}"
    )
    say(f"record {path}")


def _show_groups(document: dict) -> None:
    """KL by kind of data, and by whether sparse attention selects."""
    lanes = document["lanes"]
    first = next(iter(lanes.values()))
    names = {
        **{kind: ("by_kind", kind) for kind in first["by_kind"]},
        "positions within index_topk": ("within_topk",),
        "positions beyond index_topk": ("beyond_topk",),
    }
    rows = []
    for title, path in names.items():
        figures = {lane: one[path[0]] for lane, one in lanes.items()}
        if len(path) == 2:
            figures = {lane: one[path[1]] for lane, one in figures.items()}
        tokens = next(iter(figures.values()))["tokens"]
        cells = [f"{one['kl_mean']:.5f}" if tokens else "none" for one in figures.values()]
        rows.append((title, tokens, *cells))
    print_table("\nKL mean of", ("", "tokens", *lanes), rows)
