"""Arguments that several verbs share, and the types that typer does not know."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

_UNITS = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """``16GiB``, ``16g``, ``500 MB`` or plain bytes -> bytes."""
    match = _SIZE.fullmatch(str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 24GiB or 800MB.")
    return int(float(match[1]) * unit)


SourceFolder = Annotated[Path, typer.Argument(help="Folder of the BF16 checkpoint.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="glm-5.1, data, demo, or a TOML file. Default: data for quantize, glm-5.1 for plan.",
    ),
]
MethodChoice = Annotated[
    Literal[
        "max",
        "four-over-six",
        "mse",
        "weighted-mse",
        "local-hessian",
        "local-hessian+gptq",
        "local-hessian+descent",
    ]
    | None,
    typer.Option("--method", help="How scales and codes of weights are chosen."),
]
MtpChoice = Annotated[
    Literal["bf16", "drop"] | None,
    typer.Option("--mtp", help="Keep the MTP layer in BF16, or leave it out."),
]
HostMemory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=parse_bytes,
        help="Bound of this process's resident memory, and of the GPU's unless --device-memory is"
        " given, for example 24GiB. Default: 80 % of what is free.",
    ),
]
DeviceMemory = Annotated[
    int | None,
    typer.Option(
        "--device-memory",
        metavar="SIZE",
        parser=parse_bytes,
        help="Bound of the memory used on the GPU.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
EnginePython = Annotated[
    str | None,
    typer.Option(
        "--verify",
        metavar="PYTHON",
        help="Let the engine of this Python check the command with its own parser.",
    ),
]
