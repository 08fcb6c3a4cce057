"""``fourge inspect`` and ``fourge plan``: JSON alone on stdout, tables on stderr."""

import json
from pathlib import Path

from fourge_process import run


def test_the_inventory_of_the_example_adds_up(tiny_glm: Path):
    done = run("inspect", tiny_glm, "--json")
    assert done.status == 0
    document = json.loads(done.stdout)
    assert document["model_type"] == "glm_moe_dsa"
    assert document["quantization"] is None
    assert (document["tensors"], document["parameters"]) == (599, 5_167_200)
    assert sum(role["tensors"] for role in document["roles"]) == 599
    experts = [role for role in document["roles"] if role["role"] == "routed experts"]
    assert [(role["dtype"], role["tensors"]) for role in experts] == [("BF16", 480)]
    assert {entry["layer"] for entry in document["layers"]} == set(range(6))


def test_tables_go_to_stderr(tiny_glm: Path):
    done = run("inspect", tiny_glm)
    assert (done.status, done.stdout) == (0, "")
    assert "routed experts" in done.stderr
    assert "599 tensors, 5,167,200 parameters" in done.stderr
    done = run("plan", tiny_glm, "--memory", "4GiB", "--recipe", "demo")
    assert (done.status, done.stdout) == (0, "")
    assert "glm_moe_dsa, 5 layers, MTP bf16, recipe demo" in done.stderr


def test_a_quantization_that_is_only_a_word_is_shown(tiny_glm: Path, tmp_path: Path):
    for path in tiny_glm.glob("model*"):
        (tmp_path / path.name).symlink_to(path)
    raw = json.loads((tiny_glm / "config.json").read_text()) | {"quantization_config": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert json.loads(run("inspect", tmp_path, "--json").stdout)["quantization"] == "fp8"
