"""Rules K and M: each accident fires its rule and no other."""

import codecs
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_edits import Folder, expert, rules_of
from damage import Case
from tensor_edits import INDEX

MTP = "model.layers.3."
NORM = "model.layers.1.input_layernorm.weight"


def truncate(folder: Folder) -> None:
    path = folder.path / folder.shard_of("layers.1.")
    path.write_bytes(path.read_bytes()[:-100])


def add_tail(folder: Folder) -> None:
    path = folder.path / folder.shard_of("layers.1.")
    path.write_bytes(path.read_bytes() + b"tail")


def cut_header(folder: Folder) -> None:
    path = folder.path / folder.shard_of("layers.1.")
    path.write_bytes(path.read_bytes()[:50])


def drop_from_shard_only(folder: Folder, name: str) -> None:
    before = folder.weight_map
    folder.drop(name)
    folder.index(lambda _: before)


def store_twice(folder: Folder) -> None:
    file = folder.shard_of("layers.2.")
    tensors = load_file(folder.path / file) | {NORM: folder.load(NORM)}
    save_file(tensors, folder.path / file, metadata={"format": "pt"})


def orphan(folder: Folder, part: str, target: str) -> None:
    """Move tensors into a shard that the index does not name."""
    names = folder.names(part)
    tensors = {name: folder.load(name) for name in names}
    folder.drop(*names)
    save_file(tensors, folder.path / target, metadata={"format": "pt"})


def add_mark(folder: Folder, name: str) -> None:
    path = folder.path / name
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


def double_in_index(folder: Folder) -> None:
    """The same key twice in the text, in another shard first."""
    text = (folder.path / INDEX).read_text()
    entry = f'"{NORM}": '
    other = f'{entry}"{folder.shard_of("layers.2.")}", '
    (folder.path / INDEX).write_text(text.replace(entry, other + entry))


def misplace(folder: Folder) -> None:
    other = folder.shard_of("layers.2.")
    folder.index(lambda old: old | {NORM: other})


def forget(folder: Folder) -> None:
    folder.index(lambda old: {name: file for name, file in old.items() if name != NORM})


def fuse(folder: Folder) -> None:
    """As transformers holds experts in memory."""

    def edit(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if expert(1, 0, "gate_proj.weight") not in own:
            return own
        rest = {name: tensor for name, tensor in own.items() if ".mlp.experts." not in name}
        for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            gate_up, down = (
                [own[expert(1, e, f"{projection}.{part}")] for e in range(6)]
                for projection in ("gate_proj", "down_proj")
            )
            suffix = "" if part == "weight" else f"_{part}"
            prefix = "model.layers.1.mlp.experts."
            rest[f"{prefix}gate_up_proj{suffix}"] = torch.stack(gate_up)
            rest[f"{prefix}down_proj{suffix}"] = torch.stack(down)
        return rest

    folder.change(edit)


def fp8_scales(folder: Folder) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    folder.put({
        name: folder.load(name).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.ones(1, 1),
    })  # fmt: skip


DAMAGE: dict[str, tuple[list[str], Callable[[Folder], object]]] = {
    "missing norm": (["K01"], lambda f: f.drop(NORM)),
    "missing norm that the index names": (["K01"], lambda f: drop_from_shard_only(f, NORM)),
    "missing shared experts": (["K01"], lambda f: f.drop("layers.1.mlp.shared_experts")),
    "a head of its own beside tied embeddings": (
        ["K01"], lambda f: f.config(tie_word_embeddings=True)
    ),
    "unknown tensor": (["K01"], lambda f: f.put({"model.layers.1.extra.weight": torch.ones(4)})),
    "tensor outside layers": (["K01"], lambda f: f.put({"visual.patch.weight": torch.ones(4)})),
    "expert with a bias": (["K01"], lambda f: f.put({expert(1, 0, "up_proj.bias"): torch.ones(4)})),
    "layer beyond the config": (
        ["K01"], lambda f: f.put({"model.layers.7.input_layernorm.weight": torch.ones(64)})
    ),
    "dense MLP in a sparse layer": (
        ["K01"], lambda f: f.put({"model.layers.1.mlp.up_proj.weight": torch.ones(4, 4)})
    ),
    "scale of nothing": (
        ["K01"], lambda f: f.put({"model.layers.1.extra.weight_scale": torch.ones(4)})
    ),
    "truncated shard": (["K02"], truncate),
    "garbage tail": (["K02"], add_tail),
    "cut header": (["K02"], cut_header),
    "missing shard": (["K02"], lambda f: (f.path / f.shard_of("layers.2.")).unlink()),
    "missing MTP shard": (["K02"], lambda f: (f.path / f.shard_of(MTP)).unlink()),
    "stored twice": (["K03"], store_twice),
    "copied shard": (["K03"], lambda f: f.copy_shard(f.shard_of("layers.1."), "copy.safetensors")),
    "orphan shard": (["K04"], lambda f: orphan(f, "layers.1.", "more.safetensors")),
    "MTP shard outside the index": (["M07"], lambda f: orphan(f, MTP, "mtp.safetensors")),
    "index places a tensor elsewhere": (["K05"], misplace),
    "index lacks a tensor": (["K05"], forget),
    "index names a stranger": (
        ["K05"], lambda f: f.index(lambda old: old | {"stranger": f.shard_of("layers.1.")})
    ),
    "index names an expert too many": (
        ["K05"],
        lambda f: f.index(lambda old: old | {expert(1, 6, "up_proj.weight"): f.shard_of(NORM)}),
    ),
    "index names a tensor twice": (["K05"], double_in_index),
    "index with a byte order mark": (["K05"], lambda f: add_mark(f, INDEX)),
    "no index": (["K05"], lambda f: (f.path / INDEX).unlink()),
    "broken index": (["K05"], lambda f: (f.path / INDEX).write_text("{")),
    "index without weight_map": (["K05"], lambda f: f.write(INDEX, {"metadata": {}})),
    "missing codes": (["K06"], lambda f: f.drop(expert(1, 2, "down_proj.weight"))),
    "missing block scales": (["K06"], lambda f: f.drop(expert(1, 2, "up_proj.weight_scale"))),
    "missing scale_2": (["K06"], lambda f: f.drop(expert(2, 5, "gate_proj.weight_scale_2"))),
    "missing projection": (["K06"], lambda f: f.drop(expert(2, 5, "gate_proj."))),
    "missing expert": (["K06"], lambda f: f.drop(expert(1, 2))),
    "missing last expert": (["K06"], lambda f: f.drop(expert(1, 5))),
    "missing experts of a layer": (["K06"], lambda f: f.drop("layers.1.mlp.experts.")),
    "fused experts": (["K07"], fuse),
    "wrapped names": (["K07"], lambda f: f.rename(lambda name: f"language_model.{name}")),
    "names without model": (["K07"], lambda f: f.rename(lambda name: name.removeprefix("model."))),
    "some wrapped names": (
        ["K07"],
        lambda f: f.rename(
            lambda n: n.replace("model.layers.1.", "model.language_model.layers.1.")
        ),
    ),
    "norm of zeros": (["K08"], lambda f: f.map(NORM, torch.zeros_like)),
    "projection of zeros": (
        ["K08"], lambda f: f.map("layers.2.self_attn.o_proj.weight", torch.zeros_like)
    ),
    "empty tensor": (["K08"], lambda f: f.put({NORM: torch.ones(0, dtype=torch.bfloat16)})),
    "FP8 weight with its scales": (["K10"], fp8_scales),
    "FP8 scales alone": (
        ["K10"], lambda f: f.put({expert(1, 0, "up_proj.weight_scale_inv"): torch.ones(1, 1)})
    ),
    "FP8 keys": (["K10"], lambda f: f.flat(weight_block_size=[128, 128], fmt="e4m3")),
    "modules_to_not_convert": (["K10"], lambda f: f.flat(modules_to_not_convert=["lm_head"])),
    "the source's FP8 block": (
        ["K10"], lambda f: f.config(quantization_config={"quant_method": "fp8", "fmt": "e4m3"})
    ),
    "no MTP layer": (["M01"], lambda f: f.drop(MTP)),
    "MTP layer only in the index": (["M01"], lambda f: drop_from_shard_only(f, MTP)),
    "MTP layer that is not announced": (["M01"], lambda f: f.config(num_nextn_predict_layers=0)),
    "MTP layer without the key": (["M01"], lambda f: f.config(num_nextn_predict_layers=None)),
    "partial MTP layer": (["M02"], lambda f: f.drop(MTP + "mlp.experts.3.")),
    "MTP layer without eh_proj": (["M02"], lambda f: f.drop(MTP + "eh_proj.weight")),
    "MTP layer with a norm alone": (
        ["M02"], lambda f: f.drop(*(n for n in f.names(MTP) if not n.endswith("enorm.weight")))
    ),
    "half an indexer in the MTP layer": (["M02"], lambda f: f.drop(MTP + "self_attn.indexer.wk")),
    "MTP head of its own": (
        ["M03"], lambda f: f.put({MTP + "shared_head.head.weight": f.load("lm_head.weight") + 1})
    ),
    "MTP embedding of another shape": (
        ["M03"], lambda f: f.put({MTP + "embed_tokens.weight": torch.ones(4, 4)})
    ),
    "BF16 MTP layer not excluded": (
        ["M04"], lambda f: f.exclude(lambda own: [e for e in own if e != MTP + "*"])
    ),
    "only the MTP head not excluded": (
        ["Q09"],
        lambda f: f.exclude(
            lambda own: [*(e for e in own if e != MTP + "*"), MTP + "mlp.*", MTP + "self_attn*"]
        ),
    ),
    "packed eh_proj": (["M06"], lambda f: f.map(MTP + "eh_proj", lambda t: t.to(torch.int8))),
    "FP8 hnorm": (["M06"], lambda f: f.map(MTP + "hnorm", lambda t: t.to(torch.float8_e4m3fn))),
    "router in BF16": (["M09"], lambda f: f.config(moe_router_dtype="bfloat16")),
    "two MTP layers announced": (["M10"], lambda f: f.config(num_nextn_predict_layers=2)),
    "iterations share without training": (
        ["M11"], lambda f: f.config(index_share_for_mtp_iteration=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_an_accident_fires_its_rule(own: Case, name: str):
    wanted, damage = DAMAGE[name]
    damage(Folder(own.checkpoint))
    assert rules_of(own.checkpoint) == wanted
