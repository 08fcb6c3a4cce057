"""``fourge doctor``: what is wrong with a quantized checkpoint, and a repaired copy of it."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fourge.checkpoint.writer import write_json, writing
from fourge.cli.arguments import AsJson, parse_bytes
from fourge.cli.progress import RunDisplay
from fourge.cli.show import console, duration, print_json, say
from fourge.doctor.findings import Finding, rules
from fourge.errors import OutputError
from fourge.layerwise.budget import format_bytes
from fourge.layerwise.folders import OWN_FOLDER

STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
ENGINE_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}


def _show_rules(wanted: bool) -> None:
    if not wanted:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("rule", "severity", "what must hold", "needs", "repair"):
        table.add_column(column, overflow="fold", no_wrap=column == "rule")
    for rule in rules().values():
        style = STYLES[rule.severity]
        table.add_row(rule.id, f"[{style}]{rule.severity}[/]", rule.title, rule.needs, rule.repair)
    console.print(table)
    raise typer.Exit


Checkpoint = Annotated[
    str, typer.Argument(help="Folder of a quantized checkpoint, or a Hugging Face repository.")
]
Source = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="SOURCE",
        help="The BF16 checkpoint that it was made from: compare every tensor with it.",
    ),
]
Repair = Annotated[
    Path | None,
    typer.Option(
        "--repair", metavar="OUT", help="Write a repaired checkpoint; CHECKPOINT stays as it is."
    ),
]
Sample = Annotated[
    bool, typer.Option("--sample", help="Look at the numbers of one expert per layer only.")
]
TensorMemory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=parse_bytes,
        help="Bound of the tensors held at once, for example 2GiB.",
    ),
]
Record = Annotated[
    bool,
    typer.Option(
        "--record", help="Keep the findings in fourge/doctor.json of CHECKPOINT, for fourge report."
    ),
]
ListRules = Annotated[
    bool, typer.Option("--rules", callback=_show_rules, is_eager=True, help="List all rules.")
]


def doctor(
    checkpoint: Checkpoint,
    source: Source = None,
    repair: Repair = None,
    sample: Sample = False,
    memory: TensorMemory = None,
    record: Record = False,
    json: AsJson = False,
    _: ListRules = False,
) -> None:
    """Examine CHECKPOINT as vLLM and SGLang would read it: files, config, tensors, scales.

    Needs no GPU. Exit status 1 if there is an error among the findings. Of a repository only
    headers, small files and scalars are fetched; --sample adds one expert per layer.
    """
    # Heavy: torch, numba. Imported here so that --help stays quick.
    from fourge.doctor.examine import examine, look_at
    from fourge.doctor.experts import Depth
    from fourge.doctor.record import RECORD_NAME, describe
    from fourge.doctor.repair import check_repair, repair_and_examine

    start = time.monotonic()
    with RunDisplay(console) as display:
        evidence = look_at(checkpoint, source)
        if repair is not None:
            check_repair(evidence, repair)
        if record and not evidence.files.is_local:
            raise OutputError(
                f"{checkpoint} is not here: --record keeps the findings in the checkpoint's folder;"
                " leave it out, or download the checkpoint."
            )
        report = examine(evidence, Depth(sample, memory), display.scan)
        document = report.to_dict()
        if record:
            _keep(Path(checkpoint) / OWN_FOLDER / RECORD_NAME, describe(report, evidence))
        if repair is not None:
            document["repair"] = repair_and_examine(
                evidence, report, repair, Depth(sample, memory), display.scan
            )
    for finding in report.findings:
        _show(finding)
    _close(document, report.findings, time.monotonic() - start)
    if repair is not None:
        _show_repair(document["repair"], repair)
    if json:
        print_json(document)
    if report.has_errors:
        raise typer.Exit(1)


def _keep(path: Path, record: dict[str, Any]) -> None:
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    write_json(path, record)


def _show(finding: Finding) -> None:
    style = STYLES[finding.severity]
    console.print(
        f"[{style}]{finding.severity:7}[/] [bold]{finding.rule}[/] {rules()[finding.rule].title}"
    )
    lines = {"where": f"{finding.where} ({finding.count:,})", "found": finding.message}
    lines |= {ENGINE_NAMES[name]: told for name, told in finding.engines.items()}
    lines["remedy"] = finding.remedy
    grid = Table.grid(padding=(0, 1))
    grid.add_column(min_width=8)
    grid.add_column(overflow="fold")
    for name, text in lines.items():
        grid.add_row(f"  {name}", text)
    console.print(grid, markup=False)
    say("")


def _close(document: dict[str, Any], findings: list[Finding], seconds: float) -> None:
    shards = document["figures"]["shards"]
    size = f"{shards['tensors']:,} tensors, {format_bytes(shards['bytes'])}"
    counts = {severity: sum(one.severity == severity for one in findings) for severity in STYLES}
    told = ", ".join(
        f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count
    )
    reasons: dict[str, list[str]] = {}
    for id, reason in document["not_checked"].items():
        reasons.setdefault(reason, []).append(id)
    for reason, ids in reasons.items():
        say(f"not checked: {', '.join(ids)} ({reason})")
    say(
        f"{document['checkpoint']}: {told or 'nothing wrong'};"
        f" {len(document['checked'])} rules on {size}, {duration(seconds)}"
    )


def _show_repair(outcome: dict[str, Any], out: Path) -> None:
    for done in outcome["done"]:
        say(f"repaired {done['rule']}: {done['what']}")
    for left in outcome["not_done"]:
        say(f"not repaired {left['rule']}: {left['why']}")
    left = sorted({one["rule"] for one in outcome["left"]})
    told = f"left there: {', '.join(left)}" if left else "the doctor finds nothing there"
    say(f"{out} is written; {told}" if outcome["written"] else "nothing is written")
