"""skim: the same bytes as a full reading, and damage noticed."""

import json
from pathlib import Path

import pytest

from fourge.checkpoint.header import INDEX_NAME, read_checkpoint
from fourge.checkpoint.skim import skim
from fourge.errors import CheckpointError
from hollow_checkpoint import GLM_5_1, write_hollow_nvfp4

RAW = {
    **GLM_5_1,
    "num_hidden_layers": 5,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 2,
    "n_routed_experts": 12,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hollow_nvfp4(tmp_path / "model", RAW, tensors_per_shard=60)
    return tmp_path / "model"


def test_sizes_are_those_of_a_full_reading(folder: Path):
    full = read_checkpoint(folder).tensors
    experts = {
        name: info
        for name, info in full.items()
        if ".mlp.experts." in name and not name.startswith("model.layers.5.")
    }
    skimmed = skim(folder, 5)
    assert skimmed.expert_bytes == sum(info.nbytes for info in experts.values())
    assert skimmed.expert_dtypes == {"U8", "F8_E4M3", "F32"}
    assert skimmed.sizes == {n: i.nbytes for n, i in full.items() if n not in experts}
    assert skimmed.dtypes == {n: i.dtype for n, i in full.items() if n not in experts}


def test_single_file_of_a_library_with_spaces_in_its_header(tmp_path: Path):
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "model.layers.0.mlp.experts.0.up_proj.weight": {
                "dtype": "BF16",
                "shape": [2, 2],
                "data_offsets": [0, 8],
            },
            "model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        },
        indent=1,
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    skimmed = skim(tmp_path, 1)
    assert (skimmed.sizes, skimmed.expert_bytes) == ({"model.norm.weight": 4}, 8)
    assert skimmed.expert_dtypes == {"BF16"}


def test_shards_of_other_names_are_those_of_the_index(folder: Path):
    before = skim(folder, 5)
    index = json.loads((folder / INDEX_NAME).read_text())
    new = {old: f"part{number}.safetensors" for number, old in
           enumerate(sorted(set(index["weight_map"].values())))}  # fmt: skip
    for old, name in new.items():
        (folder / old).rename(folder / name)
    index["weight_map"] = {name: new[file] for name, file in index["weight_map"].items()}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert skim(folder, 5) == before


def test_missing_shard(folder: Path):
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    told = rf"1 of {len(shards)} shards are missing .*{shards[1].name}"
    with pytest.raises(CheckpointError, match=told):
        skim(folder, 5)


@pytest.mark.parametrize("keep", [5, 4000])
def test_truncated_shard(folder: Path, keep: int):
    path = sorted(folder.glob("*.safetensors"))[2]
    with path.open("r+b") as stream:
        stream.truncate(keep)
    with pytest.raises(CheckpointError, match="truncated"):
        skim(folder, 5)


def test_no_shards(tmp_path: Path):
    with pytest.raises(CheckpointError, match="neither"):
        skim(tmp_path, 5)
