"""``fourge plan``: what a run would read, write and hold, from headers alone."""

from dataclasses import replace

from fourge.cli.arguments import (
    AsJson,
    DeviceMemory,
    HostMemory,
    MethodChoice,
    MtpChoice,
    RecipeName,
    SourceFolder,
)
from fourge.cli.show import print_json, print_table, say
from fourge.layerwise.budget import (
    TYPICAL_BASE_BYTES,
    TYPICAL_GPU_BASE_BYTES,
    Budget,
    default_host_budget,
    format_bytes,
)
from fourge.models.survey import survey
from fourge.quantize.plan import describe, describe_resources, make_plan, upper_workload
from fourge.quantize.recipe import load_recipe

# The passes of a full calibration; its bounds are what a large model has to be planned for.
DEFAULT_RECIPE = "glm-5.1"


def plan(
    source: SourceFolder,
    recipe: RecipeName = None,
    method: MethodChoice = None,
    mtp: MtpChoice = None,
    memory: HostMemory = None,
    device_memory: DeviceMemory = None,
    json: AsJson = False,
) -> None:
    """Tell what quantizing SOURCE would take: tensors by role, bytes, memory, disk, shards.

    Reads headers only. Token counts are the recipe's upper bounds. With --device-memory the plan is
    for a GPU with that much memory, without it for the CPU.
    """
    chosen = load_recipe(recipe or DEFAULT_RECIPE)
    chosen = replace(chosen, mtp=mtp or chosen.mtp, method=method or chosen.method)
    surveyed = survey(source, mtp=chosen.mtp)
    workload = upper_workload(surveyed, chosen, on_device=bool(device_memory))
    budget = Budget(
        memory or default_host_budget(),
        base=TYPICAL_GPU_BASE_BYTES if device_memory else TYPICAL_BASE_BYTES,
        device=device_memory or 0,
        itemsize=2 if device_memory else 4,
    )
    made = make_plan(surveyed, chosen, workload, budget)
    document = describe(made) | describe_resources(made)
    if json:
        print_json(document)
    else:
        _show(document)


def _show(document: dict) -> None:
    memory, disk = document["memory"], document["disk"]
    print_table(
        f"{document['model_type']}, {document['layers']} layers, MTP {document['mtp']},"
        f" recipe {document['recipe']}, method {document['method']}",
        ("role", "tensors", "bytes"),
        [
            (role, entry["tensors"], format_bytes(entry["bytes"]))
            for role, entry in document["roles"].items()
        ],
    )
    say(
        f"in {format_bytes(document['bytes_in'])}, out {format_bytes(document['bytes_out'])}"
        f" in {document['shards']} shards; up to {document['tokens']:,} tokens"
    )
    say(
        f"host memory {format_bytes(memory['host'], up=True)} of"
        f" {format_bytes(memory['host_budget'])}"
        f" (smallest {format_bytes(memory['smallest_host'], up=True)}),"
        f" a layer in {document['groups_per_layer']} group(s) of up to"
        f" {format_bytes(memory['largest_group'])}"
    )
    if memory["device_budget"]:
        say(
            f"GPU memory {format_bytes(memory['device'], up=True)} of"
            f" {format_bytes(memory['device_budget'])}"
            f" (smallest {format_bytes(memory['smallest_device'], up=True)})"
        )
    say(
        f"disk: output {format_bytes(disk['output'])}, activations on the way"
        f" {format_bytes(disk['work'])}"
    )
    for warning in document["warnings"]:
        say(f"warning: {warning}")
