"""Rules D and Q: each accident of dtypes, shapes and metadata fires its rule and no other."""

import codecs
from collections.abc import Callable

import pytest
import torch

from checkpoint_edits import HF_QUANT, Folder, expert, rules_of
from damage import Case

DOWN = expert(1, 2, "down_proj.weight")
SHARED = "model.layers.1.mlp.shared_experts."
ATTENTION = "model.layers.1.self_attn."


def without(*entries: str) -> Callable[[Folder], object]:
    def damage(folder: Folder) -> None:
        before = folder.read("config.json")["quantization_config"]["ignore"]
        assert set(entries) <= set(before), entries
        folder.exclude(lambda own: [entry for entry in own if entry not in entries])

    return damage


def added(*entries: str) -> Callable[[Folder], object]:
    return lambda folder: folder.exclude(lambda own: [*own, *entries])


def replaced(old: str, *new: str) -> Callable[[Folder], object]:
    def damage(folder: Folder) -> None:
        without(old)(folder)
        added(*new)(folder)

    return damage


def pack(folder: Folder, *names: str) -> None:
    for name in names:
        folder.put(folder.pack(name))


def unpack(folder: Folder, prefix: str) -> None:
    """Leave BF16 weights where NVFP4 ones are."""
    for name in [name for name in folder.names(prefix) if name.endswith(".weight")]:
        rows, columns = folder.load(name).shape
        stem = name.removesuffix("weight")
        folder.drop(stem)
        folder.put({name: torch.zeros(rows, 2 * columns, dtype=torch.bfloat16)})


def metadata_in(folder: Folder, *, config: bool, other: bool) -> None:
    if not config:
        folder.config(quantization_config=None)
    if not other:
        (folder.path / HF_QUANT).unlink()


def eight_bits(folder: Folder) -> None:
    groups = folder.read("config.json")["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["num_bits"] = 8
    folder.flat(config_groups=groups)


DAMAGE: dict[str, tuple[list[str], Callable[[Folder], object]]] = {
    "BF16 bias": (["D01"], lambda f: f.map("e_score_correction_bias", lambda t: t.bfloat16())),
    "bias that was BF16": (
        ["D01"], lambda f: f.map("layers.1.mlp.gate.e_score", lambda t: t.bfloat16().float())
    ),
    "bias that was F16": (
        ["D01"], lambda f: f.map("layers.1.mlp.gate.e_score", lambda t: t.half().float())
    ),
    "bias with NaN": (
        ["D01"],
        lambda f: f.map("layers.1.mlp.gate.e_score", lambda t: t.where(t < t.max(), torch.nan)),
    ),
    "FP8 router": (
        ["D02"], lambda f: f.map("layers.1.mlp.gate.weight", lambda t: t.to(torch.float8_e4m3fn))
    ),
    "FP8 norm": (
        ["D02"], lambda f: f.map("layers.1.input_layernorm", lambda t: t.to(torch.float8_e4m3fn))
    ),
    "FP8 embedding": (
        ["D02"], lambda f: f.map("embed_tokens", lambda t: t.to(torch.float8_e4m3fn))
    ),
    "transposed codes": (["D03"], lambda f: f.map(DOWN, lambda t: t.T if t.dim() == 2 and
                                                   t.dtype == torch.uint8 else t)),
    "signed codes": (["D03"], lambda f: f.put({DOWN: f.load(DOWN).view(torch.int8)})),
    "unpacked codes": (["D03"], lambda f: f.put({DOWN: f.load(DOWN).repeat(1, 2)})),
    "BF16 block scales": (
        ["D03"], lambda f: f.map(expert(1, 2, "up_proj.weight_scale"), lambda t: t.bfloat16())
    ),
    "scale_2 per row": (
        ["D03"], lambda f: f.put({f"{DOWN}_scale_2": f.load(f"{DOWN}_scale_2").repeat(64)})
    ),
    "BF16 input_scale": (
        ["D03"], lambda f: f.map(expert(1, 2, "up_proj.input_scale"), lambda t: t.bfloat16())
    ),
    "transposed attention": (
        ["D03"], lambda f: f.map(ATTENTION + "o_proj.weight", lambda t: t[:, :-1])
    ),
    "F16 attention": (["D03"], lambda f: f.map(ATTENTION + "o_proj.weight", torch.Tensor.half)),
    "experts of another width": (
        ["D03"], lambda f: f.config(moe_intermediate_size=48, n_shared_experts=1)
    ),
    "blocks of 32": (
        ["D04"], lambda f: f.put({f"{DOWN}_scale": f.load(f"{DOWN}_scale")[:, ::2]})
    ),
    "group_size 32": (["D04"], lambda f: (f.flat(group_size=32), f.nested(group_size=32))),
    "nested group_size 32": (["D04"], lambda f: f.nested(group_size=32)),
    "BF16 down among NVFP4": (["D05"], lambda f: unpack(f, expert(1, 2, "down_proj."))),
    "FP8 down among NVFP4": (
        ["D05"],
        lambda f: f.put({DOWN: torch.zeros(64, 32).to(torch.float8_e4m3fn)}),
    ),
    "no metadata": (["Q01"], lambda f: metadata_in(f, config=False, other=False)),
    "block is a string": (["Q01"], lambda f: f.config(quantization_config="NVFP4")),
    "other file with a byte order mark": (
        ["Q01"],
        lambda f: (f.path / HF_QUANT).write_bytes(
            codecs.BOM_UTF8 + (f.path / HF_QUANT).read_bytes()
        ),
    ),
    "other file is broken": (["Q01"], lambda f: (f.path / HF_QUANT).write_text("{")),
    "files name two algorithms": (["Q01"], lambda f: f.nested(quant_algo="W4A16_NVFP4")),
    "one file declares a KV cache": (["Q01", "Q15"], lambda f: f.nested(kv_cache_quant_algo="FP8")),
    "no kv_cache_quant_algo": (["Q02"], lambda f: drop_nested(f, "kv_cache_quant_algo")),
    "no exclude_modules": (["Q02"], lambda f: drop_nested(f, "exclude_modules")),
    "no group_size": (["Q02"], lambda f: drop_nested(f, "group_size")),
    "unknown method": (["Q03"], lambda f: f.flat(quant_method="fp4")),
    "no method": (["Q03"], lambda f: f.flat(quant_method=None)),
    "lower case": (["Q03"], lambda f: (f.flat(quant_algo="nvfp4"), f.nested(quant_algo="nvfp4"))),
    "lower case in one file": (["Q03"], lambda f: f.flat(quant_algo="nvfp4")),
    "null algorithm": (["Q03"], lambda f: f.nested(quant_algo=None)),
    "8-bit weights": (["Q03"], eight_bits),
    "mixed precision": (["Q03"], lambda f: f.flat(quant_algo="MIXED_PRECISION")),
    "list is a string": (["Q04"], lambda f: f.flat(ignore="lm_head")),
    "list holds a number": (["Q04"], lambda f: f.flat(ignore=["lm_head", 3])),
    "two lists in one block": (["Q04"], lambda f: f.flat(exclude_modules=["lm_head"])),
    "two lists in two files": (["Q04"], lambda f: f.nested(exclude_modules=["lm_head"])),
    "lm_head not excluded": (["Q05"], without("lm_head")),
    "attention not excluded": (["Q05"], without("*self_attn*")),
    "dense layer not excluded": (["Q05"], without("model.layers.0.*")),
    "empty list": (["Q05"], lambda f: f.exclude(lambda own: [])),
    "no list": (["Q05"], lambda f: (f.flat(ignore=None), f.nested(exclude_modules=[]))),
    "experts excluded": (["Q05"], added("*mlp.experts*")),
    "packed attention": (["Q05"], lambda f: pack(f, ATTENTION + "o_proj.weight")),
    "BF16 experts not excluded": (["Q05"], lambda f: unpack(f, expert(1, 0)[:-2])),
    "a layer's entry without a dot": (["Q06"], added("model.layers.1*")),
    "a layer's bare entry": (["Q06"], added("model.layers.2")),
    "one expert's entry": (["Q07"], added("model.layers.2.mlp.experts.4.down_proj")),
    "one expert's glob": (["Q07"], added("model.layers.2.mlp.experts.4*")),
    "half of gate and up": (["Q08"], added("model.layers.0.mlp.gate_proj")),
    "half of q_a and kv_a": (["Q08"], added("model.layers.1.self_attn.q_a_proj")),
    "shared experts by another pattern": (
        ["Q10"], replaced("*mlp.shared_experts*", "*mlp.shared*")
    ),
    "shared experts not excluded": (["Q11"], without("*mlp.shared_experts*")),
    "shared experts packed and excluded": (
        ["Q11", "Q12"],
        lambda f: pack(f, *(f"{SHARED}{name}.weight" for name in PROJECTIONS)),
    ),
    "shared experts packed": (
        ["Q12"],
        lambda f: (
            pack(f, *(f"{SHARED}{name}.weight" for name in PROJECTIONS)),
            replaced("*mlp.shared_experts*", "model.layers.2.mlp.shared_experts*")(f),
        ),
    ),
    "some routers": (["Q13"], added("model.layers.1.mlp.gate")),
    "one layer's q_b_proj": (["Q14"], added("model.layers.1.self_attn.q_b_proj")),
    "FP8 KV cache": (
        ["Q15"],
        lambda f: (
            f.flat(kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"}),
            f.nested(kv_cache_quant_algo="FP8"),
        ),
    ),
    "KV scale that is zero": (
        ["Q16"], lambda f: f.put({ATTENTION + "k_proj.k_scale": torch.tensor(0.0)})
    ),
    "KV scale that nobody loads": (
        ["Q17"], lambda f: f.put({ATTENTION + "k_proj.k_scale": torch.tensor(0.5)})
    ),
    "recipe with another list": (
        ["Q18"],
        lambda f: (f.path / "recipe.yaml").write_text(
            "stage:\n  modifiers:\n    Quantization:\n      ignore: [lm_head]\n"
        ),
    ),
    "fused name in the list": (["Q19"], added("model.layers.1.mlp.experts.gate_up_proj")),
    "wrapped names in the list": (
        ["Q19"], replaced("model.layers.0.*", "model.language_model.layers.0.*")
    ),
    "no producer": (["Q20"], lambda f: (f.flat(producer=None), f.write(HF_QUANT, {
        "quantization": f.read(HF_QUANT)["quantization"]}))),
    "no input scales": (["A09"], lambda f: f.drop("input_scale")),
    "an input scale is missing": (["A01"], lambda f: f.drop(expert(1, 2, "up_proj.input_scale"))),
    "scale of an unquantized module": (
        ["S11"], lambda f: f.put({"lm_head.input_scale": torch.tensor(0.1)})
    ),
}  # fmt: skip
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def drop_nested(folder: Folder, key: str) -> None:
    document = folder.read(HF_QUANT)
    del document["quantization"][key]
    folder.write(HF_QUANT, document)


@pytest.mark.parametrize("name", DAMAGE)
def test_an_accident_fires_its_rule(own: Case, name: str):
    wanted, damage = DAMAGE[name]
    damage(Folder(own.checkpoint))
    assert rules_of(own.checkpoint) == wanted
