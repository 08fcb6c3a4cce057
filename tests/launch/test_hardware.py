"""Machines: by name, and as the driver reports them."""

import sys
from types import SimpleNamespace

import pytest

from fourge.errors import LaunchError
from fourge.launch import hardware


@pytest.mark.parametrize(
    ("name", "count", "hosts", "architecture"),
    [
        ("8xrtx-pro-6000", 8, 1, 120),
        ("4xrtx-pro-6000", 4, 1, 120),
        ("8xb200", 8, 1, 100),
        ("8xh200", 8, 1, 90),
        ("4xh200", 4, 1, 90),
        ("1xh200", 1, 1, 90),
        ("h200", 1, 1, 90),
        ("1xrtx-5090", 1, 1, 120),
        ("dgx-spark", 1, 1, 121),
        ("2xdgx-spark", 1, 2, 121),
        ("2x8xH200", 8, 2, 90),
    ],
)
def test_names(name: str, count: int, hosts: int, architecture: int):
    machine = hardware.parse(name)
    assert (machine.per_host, machine.hosts) == (count, hosts)
    assert machine.gpu.architecture == architecture
    assert hardware.parse(machine.name) == machine


@pytest.mark.parametrize("name", ["8xh900", "0xh200", "x8h200", "8", "", "2x2x2xh200"])
def test_unknown_machines_are_refused_with_what_is_known(name: str):
    with pytest.raises(LaunchError, match="rtx-pro-6000"):
        hardware.parse(name)


def test_every_proposed_machine_is_known():
    assert len(hardware.machines()) == 22
    for gpu in hardware.gpus().values():
        assert gpu.memory > 30 * 10**9
        assert set(gpu.sequences) == set(gpu.chunk) == {"vllm", "sglang"}
        assert all(0.5 < share < 1 for share in gpu.utilization.values())


class NoDriver(Exception):
    pass


def driver(monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, int, tuple[int, int]]] | None):
    """Replace NVML by one that reports these GPUs, or that has no driver."""

    def start() -> None:
        if gpus is None:
            raise NoDriver("Driver Not Loaded")

    def memory(index: int) -> SimpleNamespace:
        if gpus[index][1] == 0:
            raise NoDriver("Not Supported")
        return SimpleNamespace(total=gpus[index][1])

    module = SimpleNamespace(
        NVMLError=NoDriver,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(gpus or ()),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda index: gpus[index][0],
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetCudaComputeCapability=lambda index: gpus[index][2],
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)


PRO = ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 102_641_958_912, (12, 0))


def test_known_gpus_are_recognised(monkeypatch: pytest.MonkeyPatch):
    driver(monkeypatch, [PRO] * 8)
    assert hardware.detect() == hardware.parse("8xrtx-pro-6000")
    driver(monkeypatch, [("NVIDIA GB200", 199_000_000_000, (10, 0))] * 4)
    assert hardware.detect().name == "4xgb200"


def test_unified_memory_is_the_hosts(monkeypatch: pytest.MonkeyPatch):
    driver(monkeypatch, [("NVIDIA GB10", 0, (12, 1))])
    found = hardware.detect()
    assert found.name == "dgx-spark"
    assert found.gpu.memory > 10**9


def test_unknown_gpus_are_planned_for_by_their_figures(monkeypatch: pytest.MonkeyPatch):
    driver(monkeypatch, [("NVIDIA X999 Ti", 64 << 30, (12, 0))] * 2)
    found = hardware.detect()
    assert (found.name, found.gpu.memory, found.gpu.family) == ("2xnvidia-x999-ti", 64 << 30, 120)


def test_mixed_gpus_and_no_driver_are_refused(monkeypatch: pytest.MonkeyPatch):
    driver(monkeypatch, [PRO, ("NVIDIA H200", 150 << 30, (9, 0))])
    with pytest.raises(LaunchError, match="GPUs of one kind"):
        hardware.detect()
    driver(monkeypatch, None)
    with pytest.raises(LaunchError, match="needs an NVIDIA driver on this host"):
        hardware.detect()
    driver(monkeypatch, [])
    with pytest.raises(LaunchError, match="no NVIDIA GPU"):
        hardware.detect()
