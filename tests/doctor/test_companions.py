"""Rules on the files beside the weights, on the bundled example model: K11, K13, K14, M08, C07, C08
and C11; and that it is clean.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint_edits import Folder, report_of, rules_of
from fourge_process import run

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
)  # fmt: skip
STOPS = [2027, 2034, 2036]


@pytest.fixture(scope="session")
def made(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model, quantized; nobody may change it."""
    folder = tmp_path_factory.mktemp("example")
    data = folder / "data.jsonl"
    data.write_text(json.dumps({"text": "def add(a, b):\n    return a + b\n" * 20}) + "\n")
    done = run("quantize", tiny_glm, folder / "made", "--method", "max", "--data", data)
    assert done.status == 0, done.stderr
    return folder / "made"


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Folder:
    shutil.copytree(made, tmp_path / "own")
    return Folder(tmp_path / "own")


def delete(*names: str) -> Callable[[Folder], object]:
    return lambda folder: [(folder.path / name).unlink() for name in names]


def edit(name: str, **changes: Any) -> Callable[[Folder], object]:
    return lambda folder: folder.write(name, folder.read(name) | changes)


def card(text: str) -> Callable[[Folder], object]:
    return lambda folder: (folder.path / "README.md").write_text(text)


def move_token(folder: Folder, token: str, id: int) -> None:
    tokenizer = folder.read("tokenizer.json")
    for added in tokenizer["added_tokens"]:
        if added["content"] == token:
            added["id"] = id
    folder.write("tokenizer.json", tokenizer)


def append(name: str, text: str) -> Callable[[Folder], object]:
    def damage(folder: Folder) -> None:
        path = folder.path / name
        path.write_text(path.read_text() + text)

    return damage


DAMAGE: dict[str, tuple[list[str], Callable[[Folder], object]]] = {
    "FP8 base model": (["K11"], card("---\nbase_model: zai-org/GLM-5.1-FP8\n---\n# Model\n")),
    "FP8 base model in a list": (["K11"], card("---\nbase_model:\n- zai-org/GLM-5.1-FP8\n---\n")),
    "no tokenizer": (["K13"], delete("tokenizer.json", "tokenizer_config.json")),
    "no template": (["K13"], delete("chat_template.jinja")),
    "no generation config": (["K13"], delete("generation_config.json")),
    "none of them": (["K13"], delete(*TOKENIZER_FILES)),
    "broken tokenizer": (["K13"], lambda f: (f.path / "tokenizer.json").write_text("{")),
    "wrong dense layers in the card": (["K14"], card("The dense layers 0-3 stay in BF16.\n")),
    "wrong dense layers, said otherwise": (["K14"], card("Layers 1 to 2 are dense.\n")),
    "MTP layer in a second repository": (
        ["M08"],
        lambda f: (
            f.drop("model.layers.5."),
            f.config(num_nextn_predict_layers=0),
            card("Combine it with org/tiny-glm-NVFP4-MTP.\n")(f),
        ),
    ),
    "one EOS token": (["C07"], lambda f: f.config(eos_token_id=2027)),
    "an EOS token is missing": (["C07"], lambda f: f.config(eos_token_id=STOPS[:2])),
    "generation config stops once": (["C07"], edit("generation_config.json", eos_token_id=[2027])),
    "an id beyond the vocabulary": (["C11"], lambda f: move_token(f, "<think>", 2048)),
    "an id twice": (["C11"], lambda f: move_token(f, "<think>", 2038)),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_an_accident_fires_its_rule(own: Folder, name: str):
    wanted, damage = DAMAGE[name]
    damage(own)
    assert rules_of(own.path) == wanted


WITH_SOURCE: dict[str, tuple[list[str], Callable[[Folder], object]]] = {
    "another template": (["C08"], append("chat_template.jinja", "{# changed #}")),
    "another temperature": (["C08"], edit("generation_config.json", temperature=0.2)),
    "another base of rope": (
        ["C01"],
        lambda f: f.config(rope_parameters={"rope_theta": 20000.0, "rope_type": "default"}),
    ),
    "another context length": (["C01"], lambda f: f.config(max_position_embeddings=8192)),
    "another scaling factor": (["C02"], lambda f: f.config(routed_scaling_factor=1.0)),
    "another norm_topk_prob": (["C02"], lambda f: f.config(norm_topk_prob=False)),
    "written anew": (
        ["C06"],
        lambda f: f.config(
            layer_types=["indexed_attention"] * 5, indexer_types=["full"] * 5, head_dim=32,
            transformers_version="5.17.0", rope_theta=10000.0,
        ),
    ),
    "an unused key": (["C06"], lambda f: f.config(initializer_range=0.5)),
    "head_dim alone": (["C10"], lambda f: f.config(head_dim=48)),
    "another token id": (["C11"], lambda f: move_token(f, "<think>", 5)),
    "eps": (["C12"], lambda f: f.config(rms_norm_eps=1e-6)),
    "shared iterations": (["M11"], lambda f: f.config(index_share_for_mtp_iteration=True)),
    "router dtype": (["M09"], lambda f: f.config(moe_router_dtype="bfloat16")),
    "no tokenizer": (["K13"], delete(*TOKENIZER_FILES)),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_the_source_shows_what_was_changed(own: Folder, tiny_glm: Path, name: str):
    wanted, damage = WITH_SOURCE[name]
    damage(own)
    assert rules_of(own.path, tiny_glm) == wanted


@pytest.mark.parametrize("with_source", [False, True])
def test_the_example_is_clean(made: Path, tiny_glm: Path, with_source: bool):
    report = report_of(made, tiny_glm if with_source else None)
    assert report.findings == []
    assert "K13" in report.checked
    assert report.figures["shards"]["tensors"] == 1751


def test_a_file_that_no_reader_opens_is_an_error(own: Folder):
    for name in ("tokenizer.json", "generation_config.json"):
        text = (own.path / name).read_text()
        (own.path / name).write_text(text[:-20])
    (finding,) = report_of(own.path).findings
    assert (finding.rule, finding.severity) == ("K13", "error")
    assert finding.places == ("tokenizer.json", "generation_config.json")
    assert "not JSON" in finding.message


def test_a_right_card_is_no_finding(own: Folder):
    card("Layers 0-0 are dense; based on org/tiny-glm. MTP is inside.\n")(own)
    assert rules_of(own.path) == []
