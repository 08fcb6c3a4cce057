"""Rules that need the source: every accident is recognised by its name, and nothing else fires."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from damage import Case, numbers_of, rules_of
from fourge.doctor.experts import AGAINST_SOURCE, Depth
from fourge.doctor.suspects import unswizzle
from fourge.formats import nvfp4
from random_checkpoint import FAMILIES, published_config, write_checkpoint
from tensor_edits import INDEX, edit_tensors

# Gate and up [128, 64]: one tile of a kernel's layout.
CONFIG = published_config(moe_intermediate_size=128)
PARTS = ("weight", "weight_scale", "weight_scale_2")


@pytest.fixture
def own(make_case: Callable[..., Case], tmp_path: Path) -> Case:
    """A source and a checkpoint of one's own to damage."""
    return make_case("glm_moe_dsa", config=CONFIG).copy(tmp_path)


def expert(layer: int, number: int, rest: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{number}.{rest}"


def read(case: Case, name: str) -> torch.Tensor:
    index = json.loads((case.checkpoint / INDEX).read_text())
    return load_file(case.checkpoint / index["weight_map"][name])[name]


def edit(case: Case, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the bytes of one tensor."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.reshape(-1).view(torch.uint8).clone()
        return change(data.view(*tensor.shape, -1).squeeze(-1)).reshape(-1).view(tensor.dtype).view(
            tensor.shape
        )  # fmt: skip

    assert edit_tensors(case.checkpoint, name, changed) == 1


def put(case: Case, name: str, tensor: torch.Tensor) -> None:
    assert edit_tensors(case.checkpoint, name, lambda _: tensor) == 1


def exchange(case: Case, first: str, second: str, parts: tuple[str, ...] = PARTS) -> None:
    for part in parts:
        one, two = read(case, f"{first}.{part}"), read(case, f"{second}.{part}")
        put(case, f"{first}.{part}", two)
        put(case, f"{second}.{part}", one)


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Rows and columns to tiles of 128 x 4, as FlashInfer lays them out (written out in loops)."""
    rows, columns = scale.shape
    flat = torch.empty(rows * columns, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * (columns // 4) + column // 4
            inside = (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
            flat[tile * 512 + inside] = scale[row, column]
    return flat.view(rows, columns)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_checkpoint_agrees_with_its_source(make_case, family):
    case = make_case(family)
    numbers = numbers_of(case.checkpoint, case.source)
    assert numbers.findings == []
    assert numbers.not_checked == {}
    assert set(AGAINST_SOURCE) <= set(numbers.checked)
    assert numbers.figures["bit_exact_with_max"] == {"projections": 36, "compared": 36}


def test_figures_tell_the_error_of_each_layer_and_the_worst(make_case):
    case = make_case()
    figures = numbers_of(case.checkpoint, case.source).figures
    rows = figures["weight_error"]
    assert [(row["layer"], row["projection"]) for row in rows] == [
        (layer, name) for layer in (1, 2) for name in ("down_proj", "gate_proj", "up_proj")
    ]
    for row in rows:
        assert 0.07 < row["relative_rms"] < 0.11
        assert row["cosine"] == pytest.approx(1 - row["relative_rms"] ** 2 / 2, abs=1e-3)
        assert row["worst"]["relative_rms"] >= row["relative_rms"]
    worst = figures["worst_projections"]
    assert len(worst) == 10
    # The trap of exact rounding ties.
    assert worst[0]["projection"].endswith("experts.3.down_proj")
    assert worst[0]["relative_rms"] == pytest.approx(0.1437, abs=1e-4)


def test_a_source_with_fused_experts_is_understood(make_case, tmp_path: Path):
    fused = write_checkpoint(tmp_path / "fused", config=published_config(), fused_experts=True)
    numbers = numbers_of(make_case().checkpoint, fused)
    assert numbers.findings == []
    assert numbers.figures["bit_exact_with_max"]["compared"] == 36


NIBBLES = "has the two codes of every byte exchanged"
ACCIDENTS = {
    "nibbles": ("V01", NIBBLES, "gate_proj.weight", lambda data: data << 4 | data >> 4),
    "signs": ("V01", "has the signs inverted", "down_proj.weight", lambda data: data ^ 0x88),
    "swizzled": ("S08", "order of a kernel", "up_proj.weight_scale", swizzle),
    "noise": (
        "V01", "does not hold the source's weights", "up_proj.weight",
        lambda data: torch.randint(0, 256, data.shape, generator=torch.Generator()).byte(),
    ),
    "damaged rows": (
        "V01", "is damaged in part", "down_proj.weight",
        lambda data: torch.cat([data[:-6], torch.zeros_like(data[-6:])]),
    ),
    "rounded down": (
        "V02", "has a relative RMS of", "down_proj.weight",
        lambda data: torch.where(
            ((data & 7) > 1) & (torch.arange(data.shape[1]) % 4 == 0), data - 1, data
        ),
    ),
    "one code": (
        "V03", "1 codes differ", "down_proj.weight",
        lambda data: torch.cat([data[:1] ^ 0x01, data[1:]]).where(
            torch.arange(data.numel()).view(data.shape) == 9, data
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "told", "ending", "change"), ACCIDENTS.values(), ids=list(ACCIDENTS)
)
def test_an_accident_is_named(own: Case, rule, told, ending, change):
    edit(own, expert(1, 5, ending), change)
    findings = [one for one in numbers_of(own.checkpoint, own.source).findings if one.rule != "S06"]
    assert [one.rule for one in findings] == [rule]
    assert told in findings[0].message
    assert findings[0].places == (expert(1, 5, ending.split(".")[0] + ".weight"),)


def test_gate_and_up_exchanged(own: Case):
    exchange(own, expert(1, 5, "gate_proj"), expert(1, 5, "up_proj"))
    (finding,) = numbers_of(own.checkpoint, own.source).findings
    assert (finding.rule, finding.count) == ("V01", 2)
    assert "holds up_proj of the same expert" in finding.message


def test_two_experts_exchanged(own: Case):
    for name in ("gate_proj", "up_proj", "down_proj"):
        exchange(own, expert(2, 0, name), expert(2, 5, name))
    (finding,) = numbers_of(own.checkpoint, own.source).findings
    assert (finding.rule, finding.count) == ("V01", 6)
    assert "holds gate_proj of expert 5" in finding.message or "of expert 0" in finding.message


def test_block_scales_of_another_expert(own: Case):
    exchange(own, expert(2, 0, "down_proj"), expert(2, 5, "down_proj"), ("weight_scale",))
    findings = numbers_of(own.checkpoint, own.source).findings
    assert {one.rule for one in findings} <= {"V01", "V02"}
    assert findings


def test_packed_along_the_other_dimension(own: Case):
    index = json.loads((own.source / INDEX).read_text())["weight_map"]
    name = expert(1, 5, "down_proj.weight")
    w = load_file(own.source / index[name])[name]
    q = nvfp4.quantize(w.T.contiguous(), nvfp4.weight_scale_2(nvfp4.amax(w)))
    put(own, name, q.weight.view(w.shape[0], -1))
    put(own, name + "_scale", q.weight_scale.view(w.shape[0], -1))
    (finding,) = numbers_of(own.checkpoint, own.source).findings
    assert finding.rule == "V01"
    assert "packed along the other dimension" in finding.message


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.25, 4096])
def test_a_wrong_scale_of_a_pair_is_told_with_its_factor(own: Case, factor):
    for name in ("gate_proj", "up_proj"):
        put(
            own,
            expert(1, 5, f"{name}.weight_scale_2"),
            read(own, expert(1, 5, f"{name}.weight_scale_2")) * factor,
        )
    findings = numbers_of(own.checkpoint, own.source).findings
    assert {one.rule for one in findings} == {"S07"}
    diagnoses = numbers_of(own.checkpoint, own.source).diagnoses
    assert [one.factor for one in diagnoses] == pytest.approx([1 / factor] * 2, rel=0.01)


def test_an_expert_that_should_be_silent(own: Case):
    """Expert 2's down is zero in the source."""
    edit(own, expert(1, 2, "down_proj.weight"), lambda data: data + 1)
    (finding,) = numbers_of(own.checkpoint, own.source).findings
    assert finding.rule == "V05"
    assert finding.places == (expert(1, 2, "down_proj.weight"),)


def test_what_scales_show_already_is_not_told_twice(own: Case):
    edit(own, expert(1, 5, "down_proj.weight_scale"), lambda data: torch.full_like(data, 0x7F))
    put(own, expert(2, 5, "up_proj.weight_scale_2"), torch.tensor(3.0))
    assert rules_of(own.checkpoint, own.source) == ["S01", "S04"]


def test_an_error_of_the_arithmetic_itself_is_no_damage(tmp_path: Path):
    """A gate far smaller than its up: with one weight_scale_2 for both its blocks are at 2^-9."""
    source = write_checkpoint(tmp_path / "source", config=published_config())
    ending = expert(1, 5, "gate_proj.weight")
    assert edit_tensors(source, ending, lambda w: w * 2.0**-24) == 1
    assert edit_tensors(source, expert(2, 5, "up_proj.weight"), torch.ones_like) == 1
    assert edit_tensors(source, expert(2, 4, "down_proj.weight"), lambda w: w * 0 + 1e-30) == 1
    case = Case.of(source, tmp_path, vocab=256)
    numbers = numbers_of(case.checkpoint, source)
    worst = numbers.figures["worst_projections"][0]
    assert worst["projection"] + ".weight" == ending
    assert worst["relative_rms"] > 0.5
    (finding,) = numbers.findings
    assert (finding.rule, finding.severity) == ("S09", "warning")
    assert finding.places == (ending + "_scale",)


def test_a_changed_byte_of_an_unquantized_tensor_is_found(own: Case):
    name = "model.layers.2.self_attn.o_proj.weight"
    edit(own, name, lambda data: torch.cat([data[:-1], data[-1:] ^ 1]))
    (finding,) = numbers_of(own.checkpoint, own.source).findings
    assert finding.rule == "K09"
    assert finding.places == (name,)
    assert "differs from byte" in finding.message


def test_the_mtp_layer_is_compared_too(own: Case):
    name = expert(3, 5, "up_proj.weight")
    edit(own, name, lambda data: data.flip(0))
    (finding,) = numbers_of(own.checkpoint, own.source).findings
    assert (finding.rule, finding.places) == ("K09", (name,))


def test_another_dtype_with_the_same_values_is_found(own: Case):
    name = "model.layers.1.input_layernorm.weight"
    edit_tensors(own.checkpoint, name, torch.Tensor.float)
    (finding,) = numbers_of(own.checkpoint, own.source).findings
    assert (finding.rule, finding.places) == ("K09", (name,))
    assert "is F32, in the source BF16" in finding.message


def test_a_tensor_of_zeros_is_found(own: Case):
    name = "model.layers.1.mlp.gate.weight"
    edit_tensors(own.checkpoint, name, torch.zeros_like)
    (finding,) = numbers_of(own.checkpoint, own.source).findings
    assert (finding.rule, finding.places) == ("K08", (name,))


def test_a_correction_bias_that_went_through_bf16_is_left_to_its_rule(own: Case):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(own.checkpoint, name, lambda bias: bias.bfloat16().float())
    assert rules_of(own.checkpoint, own.source) == []
    edit_tensors(own.checkpoint, name, lambda bias: bias + 0.001)
    assert rules_of(own.checkpoint, own.source) == ["K09"]


def test_another_source_is_suspected(own: Case, tmp_path: Path):
    other = write_checkpoint(tmp_path / "other", config=CONFIG, seed=1)
    findings = numbers_of(own.checkpoint, other).findings
    (copies,) = [one for one in findings if one.rule == "K09"]
    assert "was it made from this source?" in copies.message
    assert "V01" in {one.rule for one in findings}


def test_a_sample_compares_one_expert_of_each_layer(own: Case):
    edit(own, expert(1, 5, "down_proj.weight"), lambda data: data << 4 | data >> 4)
    edit(own, expert(2, 2, "up_proj.weight"), lambda data: data << 4 | data >> 4)
    numbers = numbers_of(own.checkpoint, own.source, Depth(sample=True))
    assert [one.places for one in numbers.findings] == [(expert(2, 2, "up_proj.weight"),)]
    assert numbers.figures["bit_exact_with_max"]["compared"] == 6


def test_unswizzling_undoes_the_layout_of_kernels():
    scale = torch.randint(0, 256, (256, 12), generator=torch.Generator().manual_seed(0)).byte()
    undone = unswizzle(swizzle(scale))
    assert undone is not None
    assert torch.equal(undone, scale)
    assert unswizzle(scale[:100]) is None
