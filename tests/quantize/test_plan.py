"""Plans from headers: GLM-5.1 at full size, groups that fit, budgets that cannot work."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fourge.checkpoint.header import aligned_bytes
from fourge.errors import BudgetError, CheckpointError, ConfigError
from fourge.layerwise.budget import Budget, format_bytes
from fourge.models.footprint import Load
from fourge.models.survey import Source, survey
from fourge.quantize import plan as planning
from fourge.quantize.fitting import Fitting
from fourge.quantize.memory import Workload
from fourge.quantize.plan import Plan, describe, make_plan, upper_workload
from fourge.quantize.recipe import load_recipe
from hollow_checkpoint import GLM_5_1, write_hollow_checkpoint
from random_checkpoint import published_config, write_checkpoint

GIB = 1 << 30
RECIPE = load_recipe("glm-5.1")
SMALL = Workload(64, 1, Load(64, 64), workers=2, fitting=Fitting(("max",)))


@pytest.fixture(scope="module")
def glm_5_1(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("plan") / "glm-5.1"
    write_hollow_checkpoint(folder, GLM_5_1, tensors_per_shard=212)
    return survey(folder, mtp="bf16")


def glm_plan(source: Source, **budget: int) -> Plan:
    workload = upper_workload(source, RECIPE, on_device=bool(budget.get("device")))
    return make_plan(source, RECIPE, replace(workload, workers=8), Budget(**budget))


def test_glm_5_1_plans_on_24_gib_of_host_memory(glm_5_1: Source):
    plan = glm_plan(glm_5_1, host=24 * GIB)
    document = describe(plan)
    assert document["tokens"] == 8192 * 1024 + 4096 * 1024 + 256 * 8192
    # 446.0 GB of target and 19.9 GB of BF16 MTP layer
    assert document["bytes_out"] == pytest.approx(465.9e9, rel=1e-3)
    assert plan.memory.host <= 24 * GIB
    names = {name for shard in plan.layout.shards for name in shard.sizes}
    assert len(names) == 59_870 + 172_800
    assert max(shard.nbytes for shard in plan.layout.shards) < planning.MAX_SHARD_BYTES + 1e7


def test_a_gpu_holds_the_weights_so_the_host_needs_little(glm_5_1: Source):
    plan = glm_plan(glm_5_1, host=8 * GIB, device=72 * GIB)
    # Full moments of all experts would take 45 GB beside a layer's 20.
    assert max(len(layer.groups) for layer in plan.layout.layers) == 2
    assert plan.memory.host < 4 * GIB
    assert plan.memory.device <= 72 * GIB


def test_the_smallest_budget_that_is_named_works(glm_5_1: Source):
    with pytest.raises(BudgetError, match=r"2\.0 GiB of host memory is too little") as refused:
        glm_plan(glm_5_1, host=2 * GIB)
    smallest = glm_plan(glm_5_1, host=64 * GIB).memory.smallest_host
    assert format_bytes(smallest, up=True).replace(" ", "") in str(refused.value)
    assert glm_plan(glm_5_1, host=smallest).memory.host <= smallest
    with pytest.raises(BudgetError):
        glm_plan(glm_5_1, host=smallest - 1)


def test_a_device_that_is_too_small_is_refused(glm_5_1: Source):
    with pytest.raises(BudgetError, match=r"device memory is too little.*--device-memory"):
        glm_plan(glm_5_1, host=24 * GIB, device=GIB)


def test_groups_cover_every_expert_once_and_fit(glm_5_1: Source):
    plan = glm_plan(glm_5_1, host=12 * GIB)
    layer = plan.layout.layers[3]
    assert len(layer.groups) > 1
    assert list(itertools.chain(*(group.experts for group in layer.groups))) == list(range(256))
    assert [group.is_first for group in layer.groups] == [True] + [False] * (len(layer.groups) - 1)
    assert [group.is_last for group in layer.groups][-1:] == [True]
    assert sum(len(group.tensors) for group in layer.groups) == 787
    for group in layer.groups:
        assert aligned_bytes(group.tensors) <= plan.memory.largest_group


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plan") / "small")


def test_dropping_mtp_leaves_its_layer_out(small: Path):
    for mtp, present in (("bf16", True), ("drop", False)):
        plan = make_plan(survey(small, mtp=mtp), replace(RECIPE, mtp=mtp), SMALL, Budget(GIB))
        names = [name for shard in plan.layout.shards for name in shard.sizes]
        assert any(".layers.3." in name for name in names) == present
        assert ("model.layers.3.*" in plan.layout.excluded) == present
        config = json.loads(plan.layout.config_text)
        assert config["num_nextn_predict_layers"] == int(present)


def test_an_experts_width_must_be_a_multiple_of_16(tmp_path: Path):
    write_checkpoint(tmp_path / "m", config=published_config(moe_intermediate_size=40))
    with pytest.raises(ConfigError, match="moe_intermediate_size is 40; NVFP4 needs a multiple"):
        survey(tmp_path / "m", mtp="bf16")


def test_a_path_that_is_no_folder_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        survey(tmp_path / "nowhere", mtp="bf16")


def test_sizes_are_shown_so_that_they_can_be_typed_back():
    assert format_bytes(1.5 * GIB) == "1.5 GiB"
    assert format_bytes(GIB + 1, up=True) == "1.1 GiB"
    assert format_bytes(GIB, up=True) == "1.0 GiB"
    assert format_bytes(700 << 20) == "700.0 MiB"
    assert format_bytes(12) == "12 B"


def test_a_model_without_experts_is_told_that_there_is_nothing_to_do(tmp_path: Path):
    write_checkpoint(tmp_path / "m", config=published_config(first_k_dense_replace=3))
    with pytest.raises(ConfigError, match=r"only dense layers.*Mixture-of-Experts checkpoint"):
        survey(tmp_path / "m", mtp="bf16")


def test_a_config_as_transformers_saves_it_is_followed_by_its_layer_types(tmp_path: Path):
    raw = published_config() | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
    write_checkpoint(tmp_path / "m", config=raw)
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw | {"first_k_dense_replace": 3}))
    source = survey(tmp_path / "m", mtp="bf16")
    assert source.config.mlp_types == ("dense", "sparse", "sparse")
    warnings = describe(make_plan(source, RECIPE, SMALL, Budget(GIB)))["warnings"]
    assert [w for w in warnings if "first_k_dense_replace 3 does not fit" in w] == warnings


def test_sequences_beyond_the_model_s_positions_are_told(small: Path):
    long = replace(SMALL, load=Load(5000, 5000), tokens=5000)
    (warning,) = describe(make_plan(survey(small, mtp="bf16"), RECIPE, long, Budget(GIB)))[
        "warnings"
    ]
    assert "5,000 tokens go beyond the model's max_position_embeddings, 4,096" in warning
