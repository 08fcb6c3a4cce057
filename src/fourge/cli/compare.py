"""``fourge compare``: what quantization methods make of a model, measured on held-out data."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fourge.cli.arguments import AsJson, DeviceMemory, HostMemory, RecipeName, SourceFolder
from fourge.cli.progress import RunDisplay
from fourge.cli.show import console, print_json, print_table, say
from fourge.errors import RecipeError
from fourge.quantize.recipe import METHODS, load_recipe, with_overrides

BASELINE = "max"
ALL = ",".join(METHODS)
DEFAULT_CONTEXT = 256
DEFAULT_TOKENS = 128 * DEFAULT_CONTEXT

Row = dict[str, Any]

Methods = Annotated[
    str, typer.Option(help=f"Methods to compare, with commas between; of {', '.join(METHODS)}.")
]
Holdout = Annotated[
    list[str],
    typer.Option(
        metavar="[KIND=]PATH",
        help="Conversations or texts to measure on, none of them calibration data.",
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="[PASS=]PATH", help="Calibration data, as for quantize."),
]


def compare(
    source: SourceFolder,
    holdout: Holdout,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the checkpoints. Default: compare-NAME beside SOURCE's name."
        ),
    ] = None,
    methods: Methods = ALL,
    recipe: RecipeName = None,
    data: Calibration = None,
    tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens.")] = DEFAULT_TOKENS,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = DEFAULT_CONTEXT,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of windows.")] = 0,
    memory: HostMemory = None,
    device_memory: DeviceMemory = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")
    ] = "auto",
    json: AsJson = False,
) -> None:
    """Quantize SOURCE with several methods from one calibration, and measure them all.

    KL divergence, top-1 agreement and perplexity in both lanes, window by window against max. The
    checkpoints stay in --out. Interrupted at any moment, the same command goes on where it was.
    """
    names = _chosen(methods)
    chosen = with_overrides(load_recipe(recipe or "data"), data=data or (), method=names[0])
    # Heavy: torch, numba. Imported here so that --help stays quick.
    from fourge.evaluate import start as evaluating
    from fourge.quantize import start as quantizing

    folder = out or Path(f"compare-{source.resolve().name}")
    places = [(name, folder / name) for name in names]
    quantization = quantizing.Request(
        source, folder, chosen, device, "auto", memory, device_memory, folder / "work"
    )
    evaluation = evaluating.Request(
        checkpoints=tuple(place for _, place in places),
        reference=source,
        data=tuple(holdout),
        lanes=("w4a16", "w4a4"),
        tokens=tokens,
        context=context,
        seed=seed,
        device=device,
        memory=memory,
        device_memory=device_memory,
        work=folder / "work",
        record=folder / "evaluation",
    )
    _check_held_out(evaluation)
    with RunDisplay(console) as display:
        try:
            made = quantizing.run_places(
                quantization, places, on_data=display.data, on_progress=display.run
            )
            measured = evaluating.run_request(
                evaluation, on_data=display.data, on_progress=display.run
            )
        except KeyboardInterrupt:
            display.note("interrupted; run the same command to go on where it was")
            raise typer.Exit(130) from None
    rows = _rows(names, [one.record for one in made], measured.records)
    _show(source, rows, measured.records[0])
    say(f"checkpoints {folder}, records {folder}/evaluation")
    if json:
        print_json({"methods": rows, "records": [str(path) for path in measured.paths]})


def _check_held_out(request: Any) -> None:
    """FourgeError if data are not there, before hours go into what they shall measure."""
    from fourge.calibrate.sources import identify_data
    from fourge.evaluate.windows import pass_specs

    specs = pass_specs(
        request.data, tokens=request.tokens, context=request.context, seed=request.seed
    )
    for spec in specs:
        identify_data(spec.data)


def _chosen(methods: str) -> list[str]:
    """The methods that were named, after the one that all are held against."""
    named = [one.strip() for one in methods.split(",") if one.strip()]
    for name in named:
        if name not in METHODS:
            raise RecipeError(f"there is no method {name!r}: choose of {', '.join(METHODS)}.")
    return list(dict.fromkeys((BASELINE, *named)))


def _rows(names: list[str], made: list[dict], measured: list[dict]) -> list[Row]:
    rows = []
    for name, run, record in zip(names, made, measured, strict=True):
        layers = run["timing"]["layers"]
        row: Row = {
            "method": name,
            "seconds": sum(one["quantizing_seconds"].get(name, 0.0) for one in layers),
            "experts": run["method"]["experts"],
            "lanes": {},
        }
        for lane, figures in record["lanes"].items():
            row["lanes"][lane] = {
                key: figures[key] for key in ("kl_mean", "kl_p99", "top1", "ppl_candidate")
            } | _against(record, measured[0], lane)
        rows.append(row)
    return rows


def _against(record: dict, baseline: dict, lane: str) -> Row:
    """The change of mean KL, in percent of the baseline's, with its paired 95 % interval."""
    name, mean = baseline["receipt"]["checkpoint"]["name"], baseline["lanes"][lane]["kl_mean"]
    for pair in record.get("paired", []):
        if pair["lane"] == lane and pair["other"] == name and mean > 0:
            percent = [100 * one / mean for one in (pair["difference"], *pair["interval"])]
            return {"change": percent[0], "change_interval": percent[1:]}
    return {"change": 0.0, "change_interval": [0.0, 0.0]}


def _show(source: Path, rows: list[Row], record: dict) -> None:
    data = record["receipt"]["data"]
    first = next(iter(record["lanes"].values()))
    for lane in rows[0]["lanes"]:
        figures = [row["lanes"][lane] for row in rows]
        print_table(
            f"{source.resolve().name}, {lane}: {data['tokens']:,} held-out tokens in"
            f" {data['windows']:,} windows; perplexity of the source {first['ppl_reference']:.3f}",
            ("method", "KL mean", "against max, 95 %", "top-1", "ppl", "seconds"),
            [
                (
                    row["method"],
                    f"{one['kl_mean']:.5f}",
                    "{:+.1f} % ({:+.1f}, {:+.1f})".format(one["change"], *one["change_interval"]),
                    f"{one['top1']:.1%}",
                    f"{one['ppl_candidate']:.3f}",
                    f"{row['seconds']:.1f}",
                )
                for row, one in zip(rows, figures, strict=True)
            ],
        )
    for row in rows:
        chosen = ", ".join(f"{count:,} {name}" for name, count in row["experts"].items())
        say(f"{row['method']}: of the experts, {chosen}")
