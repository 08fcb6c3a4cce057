"""``fourge report``: one HTML page and a model card from what the other verbs recorded."""

from pathlib import Path
from typing import Annotated

import typer

from fourge.cli.arguments import AsJson
from fourge.cli.show import print_json, say


def report(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a README.md that a person wrote.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Write fourge/report.html and the model card README.md into CHECKPOINT.

    They show what quantize, doctor --record and evaluate left in fourge/, and nothing else.
    """
    # plotly. Imported here so that --help stays quick.
    from fourge.reports.wording import missing_records
    from fourge.reports.write import write_report

    written = write_report(checkpoint, force=force)
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
