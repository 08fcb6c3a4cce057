"""The law of the house: lower rooms never import higher ones, rooms of one level not each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fourge

PACKAGE = Path(fourge.__file__).parent
LEVELS = {
    "formats": 0,
    "checkpoint": 1,
    "chat": 1,
    "models": 2,
    "calibrate": 3,
    "doctor": 3,
    "layerwise": 3,
    "engine": 4,
    "quantize": 4,
    "evaluate": 4,
    "launch": 5,
    "reports": 5,
    "serve": 5,
    "cli": 6,
}
# Imported by --help, plan and inspect, which answer at once.
TORCH_FREE = [
    "fourge.chat",
    "fourge.chat.template",
    "fourge.chat.tokens",
    "fourge.formats.layout",
    "fourge.checkpoint.header",
    "fourge.checkpoint.inventory",
    "fourge.checkpoint.metadata",
    "fourge.checkpoint.names",
    "fourge.checkpoint.skim",
    "fourge.checkpoint.writer",
    "fourge.models.chunks",
    "fourge.models.config",
    "fourge.models.fields",
    "fourge.models.footprint",
    "fourge.models.kinds",
    "fourge.models.tensors",
    "fourge.doctor.architecture",
    "fourge.doctor.companions",
    "fourge.doctor.completeness",
    "fourge.doctor.evidence",
    "fourge.doctor.exclusion",
    "fourge.doctor.files",
    "fourge.doctor.findings",
    "fourge.doctor.matching",
    "fourge.doctor.metadata",
    "fourge.doctor.mtp",
    "fourge.doctor.scales",
    "fourge.doctor.settings",
    "fourge.doctor.shapes",
    "fourge.doctor.sharing",
    "fourge.layerwise.budget",
    "fourge.layerwise.folders",
    "fourge.layerwise.groups",
    "fourge.layerwise.progress",
    "fourge.models.survey",
    "fourge.quantize.memory",
    "fourge.quantize.plan",
    "fourge.quantize.recipe",
    "fourge.launch.catalogue",
    "fourge.launch.check",
    "fourge.launch.command",
    "fourge.launch.fitting",
    "fourge.launch.hardware",
    "fourge.launch.memory",
    "fourge.launch.options",
    "fourge.launch.pattern",
    "fourge.launch.plan",
    "fourge.launch.planner",
    "fourge.launch.reasons",
    "fourge.launch.process",
    "fourge.launch.relations",
    "fourge.launch.render",
    "fourge.launch.rewrite",
    "fourge.launch.rules",
    "fourge.launch.served",
    "fourge.launch.sglang",
    "fourge.launch.shell",
    "fourge.launch.smoke",
    "fourge.launch.verify",
    "fourge.launch.vllm",
    "fourge.cli.check_launch",
    "fourge.cli.doctor",
    "fourge.cli.evaluate",
    "fourge.cli.inspect",
    "fourge.cli.launch",
    "fourge.cli.main",
    "fourge.cli.plan",
    "fourge.cli.quantize",
    "fourge.cli.report",
    "fourge.cli.running",
]


def imports(path: Path) -> set[str]:
    """Dotted names of all fourge modules that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fourge"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fourge")}
    return found


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVELS else None


def test_every_room_has_a_level():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(LEVELS)


def test_imports_go_downward_only():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        if (own := room(f"fourge.{path.relative_to(PACKAGE).parts[0]}")) is not None
        for name in imports(path)
        if (other := room(name)) is not None and other != own and LEVELS[other] >= LEVELS[own]
    ]
    assert wrong == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_planning_imports_no_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_and_functions_stay_small():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and "kernels" not in path.parts:
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 70, f"{path}:{node.name}"
