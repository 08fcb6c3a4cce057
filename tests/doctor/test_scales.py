"""Rules S and A: each damage fires its rule and no other, and what is sound fires none."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from damage import Case, numbers_of, rules_of
from fourge.doctor.experts import Depth
from random_checkpoint import FAMILIES, published_config, write_checkpoint
from tensor_edits import edit_tensors

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
NAN, LARGEST, ONE = 0x7F, 0x7E, 0x38


def stored(change: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor], torch.Tensor]:
    """An edit of block scales that changes their bytes in place."""

    def edit(scale: torch.Tensor) -> torch.Tensor:
        data = scale.view(torch.uint8).clone()
        change(data)
        return data.view(torch.float8_e4m3fn)

    return edit


def expert(layer: int, number: int, rest: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{number}.{rest}"


def set_first(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return stored(lambda data: data[0, :1].fill_(value))


def constant(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor * factor


DAMAGE = {
    "NaN block scale": (["S01"], expert(1, 5, "up_proj.weight_scale"), set_first(NAN)),
    "minus NaN": (["S01"], expert(1, 5, "down_proj.weight_scale"), set_first(0xFF)),
    "negative block scale": (["S01"], expert(1, 5, "up_proj.weight_scale"), set_first(0xB8)),
    "zero block scale": (["S02"], expert(1, 5, "up_proj.weight_scale"), set_first(0)),
    "all block scales zero": (
        ["S02"], expert(2, 5, "down_proj.weight_scale"), stored(lambda data: data.fill_(0))
    ),
    "scale_2 NaN": (["S03"], expert(1, 3, "down_proj.weight_scale_2"), constant(float("nan"))),
    "scale_2 zero": (["S03"], expert(1, 5, "gate_proj.weight_scale_2"), constant(0.0)),
    "scale_2 infinite": (["S03"], expert(1, 5, "up_proj.weight_scale_2"), constant(float("inf"))),
    "scale_2 subnormal": (["S03"], expert(1, 5, "up_proj.weight_scale_2"), constant(1e-40)),
    "scale_2 negative": (["S03"], expert(1, 5, "up_proj.weight_scale_2"), constant(-1e-4)),
    "gate and up apart": (["S04"], expert(1, 5, "up_proj.weight_scale_2"), scaled(1.25)),
    "gate and up far apart": (["S04"], expert(1, 5, "gate_proj.weight_scale_2"), scaled(1e5)),
    "scale_2 of another order": (["S05"], expert(1, 5, "down_proj.weight_scale_2"), scaled(1e5)),
    "scale_2 ten times too large": (
        ["S05"], expert(1, 5, "down_proj.weight_scale_2"), scaled(10)
    ),
    "scale_2 a hundredth": (["S05"], expert(1, 5, "down_proj.weight_scale_2"), scaled(0.01)),
    "every scale_2 its reciprocal": (["S05"], "weight_scale_2", torch.reciprocal),
    "block scales shrunk": (
        ["S06"], expert(1, 5, "down_proj.weight_scale"), stored(lambda data: data.sub_(16))
    ),
    "half of them at 448": (
        ["S09"], expert(1, 5, "down_proj.weight_scale"),
        stored(lambda data: data[: len(data) // 2].fill_(LARGEST)),
    ),
    "half of them at 2^-9": (
        ["S09"], expert(1, 5, "down_proj.weight_scale"),
        stored(lambda data: data[: len(data) // 2].fill_(1)),
    ),
    "zero block at 448": (["S10"], expert(1, 0, "gate_proj.weight_scale"), set_first(LARGEST)),
    "input_scale gone": (["A01"], expert(1, 5, "down_proj.input_scale"), lambda _: None),
    "gate's input_scale gone": (["A01"], expert(1, 5, "gate_proj.input_scale"), lambda _: None),
    "input_scale NaN": (["A02"], expert(1, 5, "up_proj.input_scale"), constant(float("nan"))),
    "input_scale zero": (["A02"], expert(1, 5, "down_proj.input_scale"), constant(0.0)),
    "input_scale uninitialised": (["A02"], expert(1, 5, "up_proj.input_scale"), constant(2.1e-44)),
    "gate and up see different inputs": (
        ["A03"], expert(1, 5, "up_proj.input_scale"), scaled(0.5)
    ),
    "one of them 1": (["A03"], expert(1, 5, "up_proj.input_scale"), constant(1.0)),
    "an expert too loud": (["A05"], expert(2, 5, "down_proj.input_scale"), scaled(100)),
    "an expert somewhat loud": (["A11"], expert(2, 5, "down_proj.input_scale"), scaled(20)),
    "every input_scale its reciprocal": (["A02"], "input_scale", lambda old: 1 / (old * 1e-3)),
    "every input_scale of a kind 1": (["A06"], "down_proj.input_scale", constant(1.0)),
    "every input_scale 1": (["A06"], "input_scale", constant(1.0)),
    "no input_scale at all": (["A09"], "input_scale", lambda _: None),
    "an empty tensor": (["K08"], "model.norm.weight", lambda tensor: tensor[:0]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_checkpoint_gives_no_finding(make_case, family):
    case = make_case(family)
    numbers = numbers_of(case.checkpoint)
    assert numbers.findings == []
    assert {"S01", "S02", "S03", "S04", "S06", "A01", "A02"} <= set(numbers.checked)
    assert set(numbers.not_checked) >= {"K09", "V01"}


@pytest.mark.parametrize(("rules", "ending", "change"), DAMAGE.values(), ids=list(DAMAGE))
def test_a_damage_fires_its_rule_alone(own: Case, rules, ending, change):
    count = edit_tensors(own.checkpoint, ending, change)
    assert count
    findings = numbers_of(own.checkpoint).findings
    assert [one.rule for one in findings] == rules
    if count == 1 and rules[0] not in ("A03", "S04", "S06"):
        assert findings[0].places == (ending,)
        assert findings[0].count == 1


def test_findings_tell_numbers_and_places(own: Case):
    edit_tensors(own.checkpoint, expert(1, 5, "up_proj.weight_scale_2"), scaled(2))
    edit_tensors(own.checkpoint, expert(2, 4, "gate_proj.weight_scale_2"), scaled(8))
    (finding,) = numbers_of(own.checkpoint).findings
    assert finding.places == ("model.layers.1.mlp.experts.5", "model.layers.2.mlp.experts.4")
    assert "2 of 12 experts" in finding.message
    assert "up of model.layers.2.mlp.experts.4 is wrong by a factor of 8" in finding.message
    assert finding.severity == "error"
    assert set(finding.engines) == {"vllm", "sglang"}


def test_an_all_zero_expert_as_modelopt_writes_it_is_named_once(own: Case):
    """nvidia-modelopt 0.47: weight_scale_2 0, block scales NaN, codes 0x77."""
    prefix = expert(1, 2, "down_proj.")
    edit_tensors(own.checkpoint, prefix + "weight", lambda tensor: torch.full_like(tensor, 0x77))
    edit_tensors(own.checkpoint, prefix + "weight_scale", stored(lambda data: data.fill_(0xFF)))
    edit_tensors(own.checkpoint, prefix + "weight_scale_2", constant(0.0))
    (finding,) = numbers_of(own.checkpoint).findings
    assert finding.rule == "S01"
    assert "all-zero experts" in finding.message


def test_one_input_scale_of_1_among_small_ones_is_named_for_the_layer(own: Case):
    edit_tensors(own.checkpoint, "input_scale", constant(0.004))
    edit_tensors(own.checkpoint, expert(2, 5, "down_proj.input_scale"), constant(1.0))
    assert rules_of(own.checkpoint) == ["A08"]


def test_filled_in_input_scales_are_told_from_measured_and_from_shared_ones(own: Case):
    """Experts with figures of their own beside several with the same one."""
    values = iter(0.001 * (1 + 0.1 * number) for number in range(1000))
    edit_tensors(own.checkpoint, "down_proj.input_scale", lambda old: old * 0 + next(values))
    assert rules_of(own.checkpoint) == []
    for number in (1, 3, 4):
        name = expert(2, number, "down_proj.input_scale")
        edit_tensors(own.checkpoint, name, constant(6 / 2688))
    (finding,) = numbers_of(own.checkpoint).findings
    assert (finding.rule, finding.count) == ("A04", 3)


def test_an_expert_with_a_fallback_for_both_inputs_was_not_calibrated(own: Case):
    """One alone may have been measured."""
    values = iter(0.001 * (1 + 0.1 * number) for number in range(1000))
    edit_tensors(own.checkpoint, "down_proj.input_scale", lambda old: old * 0 + next(values))
    edit_tensors(own.checkpoint, expert(1, 2, "down_proj.input_scale"), constant(6 / 2688))
    assert rules_of(own.checkpoint) == []
    for name in ("gate_proj", "up_proj"):
        edit_tensors(own.checkpoint, expert(1, 2, f"{name}.input_scale"), constant(6 / 2688))
    (finding,) = numbers_of(own.checkpoint).findings
    assert (finding.rule, finding.count) == ("A04", 3)


def test_a_checkpoint_of_16_bit_activations_needs_no_input_scale(own: Case):
    edit_tensors(own.checkpoint, "input_scale", lambda _: None)
    path = own.checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_algo"] = "W4A16_NVFP4"
    path.write_text(json.dumps(config))
    assert rules_of(own.checkpoint) == []


def test_scales_that_belong_to_nothing_are_named(own: Case):
    own.add("lm_head.input_scale", torch.tensor(0.01))
    assert rules_of(own.checkpoint) == ["S11"]


def test_other_schemes_are_named(own: Case):
    prefix = expert(1, 1, "up_proj.")
    own.add(prefix + "pre_quant_scale", torch.ones(64))
    assert rules_of(own.checkpoint) == ["S12"]
    own.remove(prefix + "pre_quant_scale")
    own.add(prefix + "input_global_scale", torch.tensor([2.1e-44]))
    assert rules_of(own.checkpoint) == ["S13"]


def test_scales_of_the_kv_cache_must_be_numbers(own: Case):
    own.add("model.layers.1.self_attn.k_scale", torch.tensor(0.5))
    assert rules_of(own.checkpoint) == []
    own.add("model.layers.2.self_attn.v_scale", torch.tensor(0.0))
    assert rules_of(own.checkpoint) == ["Q16"]


def test_figures_tell_the_floor_of_each_layer(own: Case):
    edit_tensors(own.checkpoint, "input_scale", constant(0.0078125))
    edit_tensors(own.checkpoint, expert(1, 3, "down_proj.input_scale"), constant(0.015625))
    rows = numbers_of(own.checkpoint).figures["input_scale"]
    assert len(rows) == 4
    row = next(one for one in rows if (one["layer"], one["projections"]) == (1, "down"))
    assert row["largest"] == 2 * row["median"] == 2 * row["smallest"] == 2**-6
    assert row["floor"] == 6 * 2.0**-9 * 2**-6


def test_scales_tied_after_packing_show_in_their_largest_blocks(make_case, tmp_path: Path):
    """Gate and up quantized each on its own, then given one weight_scale_2: no scale is odd."""
    config = published_config(n_routed_experts=36)
    case = make_case("glm_moe_dsa", config=config).copy(tmp_path)
    reach_448 = stored(lambda data: data[5, :1].fill_(LARGEST))
    for number in (0, *range(2, 36)):  # gate and up of expert 1 are zero
        for name in ("gate_proj", "up_proj"):
            for layer in (1, 2):
                edit_tensors(
                    case.checkpoint, expert(layer, number, f"{name}.weight_scale"), reach_448
                )
    (finding,) = numbers_of(case.checkpoint).findings
    assert finding.rule == "S06"
    assert "overwritten after packing" in finding.message


def test_weights_of_a_bounded_law_are_not_taken_for_tied_later(tmp_path: Path):
    """Large experts whose values come from one table: all largest weights are the same."""
    config = published_config(
        num_hidden_layers=2, hidden_size=256, moe_intermediate_size=256, n_routed_experts=64,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    source = write_checkpoint(tmp_path / "source", config=config, traps=False)
    case = Case.of(source, tmp_path, vocab=256)
    top = [
        one.highest == LARGEST
        for one in numbers_of(case.checkpoint).facts
        if one.projection.name != "down_proj"
    ]
    assert sum(top) > 0.99 * len(top)
    assert rules_of(case.checkpoint) == []


def test_weights_between_two_bounds_are_not_taken_for_clipped(tmp_path: Path):
    """As torch.nn.Linear begins: the largest of 16 weights is near the bound everywhere."""
    source = write_checkpoint(tmp_path / "source", config=published_config(), traps=False)
    torch.manual_seed(0)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert edit_tensors(source, f"{name}.weight", lambda w: w.uniform_(-0.1, 0.1))
    case = Case.of(source, tmp_path, vocab=256)
    facts = numbers_of(case.checkpoint).facts
    assert max(one.largest / one.blocks for one in facts) > 0.3
    assert rules_of(case.checkpoint) == []


def test_a_finding_drawn_from_scales_alone_is_dropped_when_the_source_agrees(tmp_path: Path):
    """An expert whose weights really are ten times those of the others."""
    source = write_checkpoint(tmp_path / "source", config=published_config())
    assert edit_tensors(source, expert(1, 5, "down_proj.weight"), lambda w: w * 10) == 1
    case = Case.of(source, tmp_path, vocab=256)
    assert rules_of(case.checkpoint) == ["S05"]
    assert rules_of(case.checkpoint, source) == []


def test_exports_that_do_not_reach_448_are_not_held_to_it(own: Case):
    """Four-over-six: the largest scale is 256."""
    lower = stored(lambda data: data.copy_(torch.where(data == ONE, data, data.clamp(max=0x78))))
    edit_tensors(own.checkpoint, "weight_scale", lower)
    numbers = numbers_of(own.checkpoint)
    assert numbers.findings == []
    assert numbers.not_checked["S06"] == "holds for max exports only"


def test_constant_weights_are_not_crowded(own: Case):
    """All blocks at 448 and all codes at 6: nothing was clipped."""
    prefix = expert(1, 5, "down_proj.")
    edit_tensors(own.checkpoint, prefix + "weight", lambda tensor: torch.full_like(tensor, 0xF7))
    edit_tensors(own.checkpoint, prefix + "weight_scale", stored(lambda data: data.fill_(LARGEST)))
    assert rules_of(own.checkpoint) == []


def test_a_sample_reads_one_expert_of_each_layer(own: Case):
    edit_tensors(own.checkpoint, expert(1, 1, "up_proj.weight_scale"), set_first(NAN))
    edit_tensors(own.checkpoint, expert(2, 5, "up_proj.weight_scale"), set_first(NAN))
    (finding,) = numbers_of(own.checkpoint, depth=Depth(sample=True)).findings
    assert finding.places == (expert(1, 1, "up_proj.weight_scale"),)


def test_the_bundled_example_gives_no_finding(tiny_glm: Path, tmp_path: Path):
    case = Case.of(tiny_glm, tmp_path, vocab=np.iinfo(np.uint8).max)
    assert rules_of(case.checkpoint, case.source) == []


def test_a_checkpoint_of_modelopt_has_its_zero_experts_and_nothing_else(tmp_path: Path):
    """Golden tensors of nvidia-modelopt 0.47: NaN scales where a projection is all zero."""
    golden = load_file(GOLDEN / "modelopt-experts.safetensors")
    made = json.loads((GOLDEN / "source.json").read_text())
    source = write_checkpoint(tmp_path / "source", config=made["config"], seed=made["seed"])
    case = Case.of(source, tmp_path, vocab=made["config"]["vocab_size"])
    for name, tensor in golden.items():
        edit_tensors(case.checkpoint, name, lambda _, tensor=tensor: tensor)
    (finding,) = numbers_of(case.checkpoint, source).findings
    assert (finding.rule, finding.count) == ("S01", 6)
    figures = numbers_of(case.checkpoint, source).figures
    assert figures["bit_exact_with_max"] == {"projections": 42, "compared": 48}
