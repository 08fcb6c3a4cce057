"""Repositories on a hub: headers, small files and scalars through ranges, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_edits import Folder, expert, report_of
from damage import Case
from fourge.doctor.examine import examine, look_at
from fourge.doctor.experts import Depth
from fourge.errors import CheckpointError
from hub_server import serve
from random_checkpoint import published_config

NAME = "org/tiny-NVFP4"
# Shards of several megabytes, of which the first half is fetched at once.
CONFIG = published_config(hidden_size=512, moe_intermediate_size=512, n_routed_experts=8)


@pytest.fixture
def own(make_case: Callable[..., Case], tmp_path: Path) -> Case:
    return make_case("glm_moe_dsa", config=CONFIG).copy(tmp_path)


def test_headers_and_scalars_are_fetched_and_no_weights(own: Case):
    shards = list(own.checkpoint.glob("model-*.safetensors"))
    with serve({NAME: own.checkpoint}) as hub:
        report = report_of(f"{hub.address}/{NAME}")
        assert hub.bytes_of(".safetensors") < sum(path.stat().st_size for path in shards) / 3
        for path in shards:
            assert hub.bytes_of(path.name) <= max(path.stat().st_size // 3, 512 << 10)
    assert report.findings == []
    local = report_of(own.checkpoint)
    assert report.figures == local.figures
    unread = {"S01", "S02", "S06", "S09", "S10"}
    assert set(local.checked) - set(report.checked) == unread
    assert all("--sample" in report.not_checked[rule] for rule in unread)


def test_accidents_in_headers_and_scalars_are_found_from_afar(own: Case):
    folder = Folder(own.checkpoint)
    folder.map(expert(1, 5, "up_proj.weight_scale_2"), lambda t: t * 1.25)
    folder.map(expert(2, 7, "down_proj.input_scale"), lambda t: t * 0)
    folder.map("layers.2.mlp.gate.e_score_correction_bias", lambda t: t.bfloat16().float())
    folder.flat(quant_algo="nvfp4")
    path = folder.path / folder.shard_of("lm_head")
    path.write_bytes(path.read_bytes() + b"tail")
    with serve({NAME: own.checkpoint}) as hub:
        report = report_of(f"{hub.address}/{NAME}")
    wanted = {"K02", "D01", "S04", "A02", "Q03"}
    assert {finding.rule for finding in report.findings} == wanted
    assert [one.to_dict() for one in report.findings] == [
        one.to_dict() for one in report_of(own.checkpoint).findings
    ]


def test_a_sample_fetches_one_expert_of_each_layer(own: Case):
    folder = Folder(own.checkpoint)
    nan = folder.load(expert(1, 1, "up_proj.weight_scale")).clone()
    nan.view(torch.uint8)[3, 3] = 0x7F
    folder.put({expert(1, 1, "up_proj.weight_scale"): nan})
    with serve({NAME: own.checkpoint}) as hub:
        evidence = look_at(f"{hub.address}/{NAME}", None)
        report = examine(evidence, Depth(sample=True), lambda *_: None)
        total = sum(path.stat().st_size for path in own.checkpoint.glob("*.safetensors"))
        assert hub.bytes_of(".safetensors") < total / 2
    (finding,) = report.findings
    assert finding.rule == "S01"
    assert finding.places == (expert(1, 1, "up_proj.weight_scale"),)


def test_a_remote_source_is_compared_in_a_sample(own: Case):
    Folder(own.checkpoint).map("layers.2.input_layernorm.weight", lambda t: t * 2)
    with serve({NAME: own.checkpoint, "org/tiny": own.source}) as hub:
        evidence = look_at(f"{hub.address}/{NAME}", f"{hub.address}/org/tiny")
        report = examine(evidence, Depth(sample=True), lambda *_: None)
    (finding,) = report.findings
    assert (finding.rule, finding.places) == ("K09", ("model.layers.2.input_layernorm.weight",))
    assert report.figures["bit_exact_with_max"]["compared"] == 6


def test_a_server_that_gives_no_ranges_is_refused_before_it_sends_a_shard(own: Case):
    hub = serve({NAME: own.checkpoint}, ranges=False)
    with hub as place, pytest.raises(CheckpointError, match="does not give parts of files"):
        report_of(f"{place.address}/{NAME}")


def test_a_repository_that_is_not_there_is_named():
    with serve({}) as hub, pytest.raises(CheckpointError, match="org/none is no folder here"):
        report_of(f"{hub.address}/org/none")
