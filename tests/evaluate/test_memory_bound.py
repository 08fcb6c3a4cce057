"""--memory bounds an evaluation as the operating system sees it, and changes no figure."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourge_process import run
from random_checkpoint import published_config, write_checkpoint, write_input_ids
from watched_process import MIB, roomy_folder, run_watched, smallest_memory

# 760 MiB, nearly all of it in the experts of one layer; 240 MiB when they are NVFP4.
LARGE = published_config(
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    hidden_size=1024,
    intermediate_size=1024,
    moe_intermediate_size=512,
    n_routed_experts=240,
    vocab_size=8192,
)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with roomy_folder(tmp_path_factory.mktemp("roomy"), needed=2 << 30) as folder:
        yield folder


def figures(document: dict[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("lanes", "floor", "layers")}


def test_the_smallest_memory_that_is_named_works_is_kept_and_changes_no_figure(roomy: Path):
    source = write_checkpoint(roomy / "source", config=LARGE, num_shards=1)
    data = write_input_ids(roomy / "ids.jsonl", sequences=2, length=128, vocab=8192)
    done = run("quantize", source, roomy / "made", "--method", "max", "--data", data)
    assert done.status == 0, done.stderr
    command = ("evaluate", roomy / "made", "--reference", source, "--data", data, "--json")
    smallest = smallest_memory(*command)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))

    bounded = run_watched(*command, "--memory", smallest, "--record", roomy / "bounded")
    roomier = run_watched(*command, "--memory", "6GiB", "--record", roomy / "roomier")

    assert bounded.status == roomier.status == 0, bounded.stderr + roomier.stderr
    assert 100 * MIB < bounded.peak <= smallest
    # The layer that lies in memory whole, twice, would not have fitted.
    assert smallest < 0.9 * weights
    assert roomier.peak > weights
    assert figures(json.loads(bounded.stdout)) == figures(json.loads(roomier.stdout))
    receipt = json.loads(bounded.stdout)["receipt"]
    assert receipt["memory_budget_bytes"] == smallest
    assert abs(receipt["peak_resident_bytes"] - bounded.peak) < 16 * MIB
