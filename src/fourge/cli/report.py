"""``fourge report``: one HTML page and a model card from what the other verbs recorded."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourge.cli.arguments import AsJson
from fourge.cli.show import print_json, say
from fourge.errors import LaunchError
from fourge.launch.hardware import Hardware, parse
from fourge.launch.options import Endpoint
from fourge.launch.plan import ENGINES, Request
from fourge.launch.planner import make_plan
from fourge.launch.render import make_launch, render
from fourge.launch.served import look_at

if TYPE_CHECKING:
    from fourge.reports.card import ServeCommand


def report(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a README.md that a person wrote.")
    ] = False,
    hardware: Annotated[
        str,
        typer.Option(metavar="MACHINE", help="What the card's commands are for, as in launch."),
    ] = "8xb200",
    json: AsJson = False,
) -> None:
    """Write fourge/report.html and the model card README.md into CHECKPOINT.

    They show what quantize, doctor --record and evaluate left in fourge/, and nothing else.
    """
    # plotly. Imported here so that --help stays quick.
    from fourge.reports.wording import missing_records
    from fourge.reports.write import write_report

    machine = parse(hardware)
    written = write_report(checkpoint, force=force, commands=_commands(checkpoint, machine))
    missing = missing_records(written.records)
    for what, command in missing:
        say(f"not measured: {what}; {command}")
    if written.kept is not None:
        say(
            f"{written.kept} was written by somebody else and stays; the card is {written.card}"
            " (--force puts it in its place)"
        )
    else:
        say(f"card    {written.card}")
    say(f"report  {written.report}")
    if json:
        print_json(
            {
                "report": str(written.report),
                "card": str(written.card),
                "kept": None if written.kept is None else str(written.kept),
                "not_measured": [what for what, _ in missing],
            }
        )


def _commands(checkpoint: Path, machine: Hardware) -> "list[ServeCommand]":
    """A command for every engine that can serve it there, without the place of the folder."""
    from fourge.reports.card import ServeCommand

    found = []
    name, place = checkpoint.resolve().name, shlex.quote(str(checkpoint.resolve()))
    for engine in ENGINES:
        try:
            plan = make_plan(look_at(checkpoint), Request(engine=engine, hardware=machine))
        except LaunchError as error:
            say(f"no {engine} command on the card: {error}")
            continue
        made = make_launch(plan, Endpoint(name, "127.0.0.1", 8000, None), (), contained=False)
        text = render(made, "shell").replace(place, shlex.quote(name))
        found.append(ServeCommand(f"{engine} {made.version} on {machine.name}", text))
    return found
