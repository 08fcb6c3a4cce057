"""``fourge inspect``: what is in a checkpoint, from headers alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fourge.checkpoint.header import read_checkpoint
from fourge.checkpoint.inventory import by_role, inventory, like_layers
from fourge.checkpoint.metadata import read_config
from fourge.cli.arguments import AsJson
from fourge.cli.show import print_json, print_table, say
from fourge.layerwise.budget import format_bytes


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of any safetensors checkpoint.")],
    json: AsJson = False,
) -> None:
    """List what CHECKPOINT holds by role, dtype and layer, without loading a tensor."""
    headers = read_checkpoint(checkpoint)
    _, config = read_config(checkpoint)
    entries = inventory(headers)
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        quantization = {"quant_method": str(quantization)}
    document = {
        "model_type": config.get("model_type"),
        "quantization": quantization.get("quant_algo") or quantization.get("quant_method"),
        "shards": len(headers.shards),
        "tensors": len(headers.tensors),
        "parameters": sum(entry.parameters for entry in entries),
        "bytes": sum(entry.bytes for entry in entries),
        "roles": [_without_layer(asdict(entry)) for entry in by_role(entries)],
        "layers": [asdict(entry) for entry in entries if entry.layer is not None],
    }
    if json:
        print_json(document)
        return
    print_table(
        f"{document['model_type']}, quantization {document['quantization'] or 'none'}",
        ("role", "dtype", "tensors", "parameters", "size"),
        [
            (entry.role, entry.dtype, entry.tensors, entry.parameters, format_bytes(entry.bytes))
            for entry in by_role(entries)
        ],
    )
    print_table(
        "\nby layer (each)",
        ("layers", "role", "dtype", "tensors", "size"),
        [
            (_layers(run) if number == 0 else "", entry.role, entry.dtype, entry.tensors,
             format_bytes(entry.bytes))
            for run, own in like_layers(entries)
            for number, entry in enumerate(own)
        ],
    )  # fmt: skip
    say(
        f"\n{document['tensors']:,} tensors, {document['parameters']:,} parameters,"
        f" {format_bytes(document['bytes'])} in {document['shards']} shards"
    )


def _without_layer(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key != "layer"}


def _layers(run: range) -> str:
    return str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}"
