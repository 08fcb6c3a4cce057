"""The entry point: verbs, and what every verb's end looks like.

Exit status: 0 good, 1 findings or a failed check, 2 unusable input (one sentence on stderr), 130
interrupted. A traceback means a bug of fourge.
"""

import os
import sys
from typing import Annotated

import typer

from fourge import __version__
from fourge.cli.inspect import inspect
from fourge.cli.plan import plan
from fourge.cli.quantize import quantize
from fourge.errors import FourgeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make, prove and serve NVFP4 checkpoints of very large Mixture-of-Experts models.",
)
app.command()(plan)
app.command()(quantize)
app.command()(inspect)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fourge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of fourge itself."""


def main() -> None:
    """Run the command line; the user's mistakes and the machine's refusals end in one sentence."""
    # Before torch is imported: threads that wait by spinning take the cores from fourge's own
    # reading and packing threads, and on a shared machine from each other (5 to 10 times slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except FourgeError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(f"{where}{error.strerror or error}."))


def _fail(message: str) -> int:
    print(f"fourge: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
