"""Machines and small models with GLM-5.1's shapes, for tests of launching."""

from dataclasses import replace
from pathlib import Path

from fourge.launch.hardware import Hardware, parse
from fourge.launch.options import Endpoint
from fourge.launch.plan import Plan, Request
from fourge.launch.planner import make_plan
from fourge.launch.served import Served, look_at
from hollow_checkpoint import GLM_5_1, write_hollow_checkpoint, write_hollow_nvfp4

PUBLISHED = Path(__file__).parent / "launch" / "published"
ENDPOINT = Endpoint("GLM-5.1", "127.0.0.1", 8000, None)
MACHINES = (
    "8xrtx-pro-6000", "4xh200", "8xh200", "4xb200", "8xb200", "8xb300", "8xh100", "4xgb200",
    "2x8xh200", "2x8xrtx-pro-6000",
)  # fmt: skip


def on(name: str, **shares: float) -> Hardware:
    """A machine by name, with other shares of its memory for an engine."""
    machine = parse(name)
    return replace(machine, gpu=replace(machine.gpu, utilization=shares)) if shares else machine


def plan_for(served: Served, engine: str, machine: str, **asked: object) -> Plan:
    """A plan; what is not asked for is the planner's choice."""
    return make_plan(served, Request(engine=engine, hardware=parse(machine), **asked))


def hollow(folder: Path, *, nvfp4: bool = True, mtp: str = "bf16", **changed: object) -> Served:
    """A GLM-5.1 of fewer layers and experts, changed."""
    raw = {
        **GLM_5_1,
        "num_hidden_layers": 6,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 3,
        "n_routed_experts": 16,
        **changed,
    }
    if nvfp4:
        write_hollow_nvfp4(folder, raw, tensors_per_shard=400, mtp=mtp)
    else:
        write_hollow_checkpoint(folder, raw, tensors_per_shard=400)
    return look_at(folder)
