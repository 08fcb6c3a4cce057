"""The entry point: verbs, and what every verb's end looks like.

Exit status: 0 good, 1 findings or a failed check, 2 unusable input (one sentence on stderr), 130
interrupted. A traceback means a bug of fourge.
"""

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fourge import __version__
from fourge.errors import FourgeError

# In the order of --help; the module of each, and the function in it, have the verb's name.
VERBS = (
    "plan",
    "quantize",
    "doctor",
    "evaluate",
    "compare",
    "report",
    "serve",
    "chat",
    "launch",
    "check-launch",
    "inspect",
)


class Verbs(TyperGroup):
    """The verbs, each imported when it is asked for: launch and check-launch answer at once, which
    they could not if they waited for what quantize and plan need.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        name = cmd_name.replace("-", "_")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(getattr(importlib.import_module(f"fourge.cli.{name}"), name))
        return typer.main.get_command(single)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make, prove and serve NVFP4 checkpoints of very large Mixture-of-Experts models.",
)


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
    # Before torch is imported: threads that spin while they wait take the cores from fourge's own
    # reading and packing threads, and on a shared machine from each other. On two cores with one
    # busy process a run took 8-14 s with GNU OpenMP's default of 300,000 rounds, 0.8 s with 1,000,
    # which cost a tenth on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
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
