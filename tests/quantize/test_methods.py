"""Every method against what it says of itself: its measure of error, its scales, its format."""

from typing import Any

import pytest
import torch

from fourge.calibrate.kinds import Kind
from fourge.calibrate.moments import Measures, reduced
from fourge.errors import CheckpointError
from fourge.formats import e2m1, nvfp4
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.quantize import judge
from fourge.quantize.methods import METHODS
from fourge.quantize.methods.expert import Expert
from fourge.quantize.methods.gptq import PANEL
from fourge.quantize.recipe import METHODS as NAMES
from fourge.quantize.recipe import NEEDS

HIDDEN, INNER = 160, 64  # gate and up are wider than a panel of gptq
assert HIDDEN > PANEL
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def moment_of(width: int, seed: int) -> torch.Tensor:
    """Of inputs whose columns depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    x = x * torch.exp(0.7 * torch.randn(width, generator=generator))
    return x.T @ x / len(x)


def make_expert(seed: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int, size: float) -> torch.Tensor:
        return (size * torch.randn(rows, columns, generator=generator)).bfloat16()

    shapes = ((INNER, HIDDEN, 0.02), (INNER, HIDDEN, 0.05), (HIDDEN, INNER, 0.03))
    return Expert("model.layers.1.mlp.experts.0.", *(weight(*shape) for shape in shapes))


FULL = Measures(moment_of(HIDDEN, 1), moment_of(INNER, 2))


def measures_for(method: str) -> Measures:
    return Measures(*(reduced(one.clone(), NEEDS[method]) for one in FULL))


def quantized(method: str, expert: Expert | None = None) -> dict[str, NVFP4Tensor]:
    return METHODS[method].quantize(expert or make_expert(), measures_for(method))


def error(expert: Expert, found: dict[str, NVFP4Tensor], name: str, measure: torch.Tensor) -> float:
    """e^T H e summed over rows; ``measure``: of any kind, or None of no numbers for squares."""
    e = (nvfp4.dequantize(found[name]) - getattr(expert, name).float()).double()
    if measure.dim() == 3:
        measure = torch.block_diag(*measure)
    elif measure.dim() == 1:
        measure = torch.diag(measure) if measure.numel() else torch.eye(e.shape[1])
    return float(((e @ measure.double()) * e).sum())


def measure_for(name: str, measures: Measures) -> torch.Tensor:
    return measures.down if name == "down_proj" else measures.gate_up


def test_recipes_and_methods_have_the_same_names():
    assert tuple(METHODS) == NAMES
    assert all(rival in METHODS for method in METHODS.values() for rival in method.rivals)


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_as_engines_and_the_doctor_want_them(method: str):
    found = quantized(method)
    assert tuple(found) == PROJECTIONS
    assert torch.equal(found["gate_proj"].weight_scale_2, found["up_proj"].weight_scale_2)
    for name, q in found.items():
        rows, columns = getattr(make_expert(), name).shape
        assert q.weight.shape == (rows, columns // 2)
        assert q.weight_scale.shape == (rows, columns // 16)
        assert q.weight_scale.dtype == torch.float8_e4m3fn
        assert q.weight_scale_2.shape == ()
        scales = q.weight_scale.float()
        assert bool(((scales >= 2**-9) & (scales <= 448)).all())
        assert 0 < float(q.weight_scale_2) < 1
        assert bool(nvfp4.dequantize(q).isfinite().all())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "max"])
def test_a_method_beats_max_by_its_own_measure(method: str):
    expert, found, plain = make_expert(), quantized(method), quantized("max")
    for name in PROJECTIONS:
        measure = measure_for(name, measures_for(method))
        ours, theirs = (error(expert, one, name, measure) for one in (found, plain))
        assert ours < 0.98 * theirs, name


def test_what_knows_more_errs_less_by_the_whole_measure():
    expert = make_expert()
    order = ("max", "weighted-mse", "local-hessian", "local-hessian+gptq", "local-hessian+descent")
    made = {method: quantized(method) for method in order}
    for name in PROJECTIONS:
        errors = [error(expert, made[method], name, measure_for(name, FULL)) for method in order]
        assert errors == sorted(errors, reverse=True), (name, errors)
        assert errors[-1] < 0.6 * errors[0], (name, errors)


def test_four_over_six_takes_the_better_of_two_scales_in_every_block():
    expert, found = make_expert(), quantized("four-over-six")
    for name in PROJECTIONS:
        w_NBS = getattr(expert, name).float().unflatten(-1, (-1, 16))
        q = found[name]
        shared = max(expert.gate_proj.abs().max(), expert.up_proj.abs().max()).float()
        amax = expert.down_proj.float().abs().max() if name == "down_proj" else shared
        assert torch.equal(q.weight_scale_2, amax / (6 * 256))
        errors, scales = [], []
        for largest in (6.0, 4.0):
            scale = (w_NBS.abs().amax(-1) / largest / q.weight_scale_2).to(torch.float8_e4m3fn)
            divisor = (scale.float() * q.weight_scale_2).unsqueeze(-1)
            value = e2m1.decode(e2m1.encode(w_NBS / divisor)) * divisor
            errors.append((value - w_NBS).square().sum(-1))
            scales.append(scale.float())
        ours = (nvfp4.dequantize(q).unflatten(-1, (-1, 16)) - w_NBS).square().sum(-1)
        torch.testing.assert_close(ours, torch.minimum(*errors), rtol=1e-4, atol=1e-12)
        share = float((errors[1] < errors[0]).float().mean())
        assert 0.1 < share < 0.9, "both are chosen"


def test_gptq_columns_make_up_for_the_errors_before_them():
    """A row of two equal inputs: what the first loses the second gives back."""
    gate_up = torch.full((32, 32), 0.999) + 0.001 * torch.eye(32)
    expert = make_expert()
    narrow = Expert("x.", *(one[:, :32].contiguous() for one in expert[1:3]), expert.down_proj)
    measures = Measures(gate_up, FULL.down.clone())
    found = METHODS["local-hessian+gptq"].quantize(narrow, measures)
    for name in ("gate_proj", "up_proj"):
        w = getattr(narrow, name).float()
        lost = (nvfp4.dequantize(found[name]) - w).sum(-1).abs().mean()
        nearest = (nvfp4.dequantize(quantized("max", narrow)[name]) - w).sum(-1).abs().mean()
        assert float(lost) < 0.4 * float(nearest)


@pytest.mark.parametrize("method", METHODS)
def test_traps(method: str):
    """Zeros, a dead column, one huge weight, columns that tell the same; a NaN is refused."""
    expert = make_expert()
    expert.gate_proj.zero_()
    expert.up_proj[:, 5] = 0
    expert.down_proj[3, 7] = 900.0
    measures = Measures(FULL.gate_up.clone(), FULL.down.clone())
    for one in measures:
        one[4] = one[3]
        one[:, 4] = one[:, 3]
        one[9], one[:, 9] = 0, 0
    kind = NEEDS[method]
    reduced_ones = Measures(*(reduced(one, kind) for one in measures))
    found = METHODS[method].quantize(expert, reduced_ones)
    for q in found.values():
        scales = q.weight_scale.float()
        assert bool(scales.isfinite().all())
        assert bool((scales > 0).all())
    assert not nvfp4.dequantize(found["gate_proj"]).any()
    assert not nvfp4.dequantize(found["up_proj"])[:, 5].any() or kind == Kind.FULL
    assert float(nvfp4.dequantize(found["down_proj"])[3, 7]) == pytest.approx(900, rel=0.07)
    expert.up_proj[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight"):
        METHODS[method].quantize(expert, reduced_ones)


def held_out(count: int, width: int = HIDDEN) -> Any:
    from fourge.calibrate.moments import HeldOut

    held = HeldOut()
    generator = torch.Generator().manual_seed(4)
    held.meet(torch.randn(count, width, generator=generator), torch.ones(count))
    return held


def test_the_judge_measures_the_whole_expert_in_both_lanes():
    expert, held = make_expert(), held_out(40)
    made = {"max": quantized("max")}
    made["broken"] = made["max"] | {"down_proj": quantized("max", make_expert(9))["down_proj"]}
    sample = torch.randn(64, HIDDEN)
    errors = judge.output_errors(expert, made, held, sample)
    assert 0 < errors["max"].w4a16 < errors["max"].w4a4 < 0.2
    assert errors["broken"].w4a16 > 1
    assert judge.best(errors, "broken") == "max"
    assert judge.best(errors, "max") == "max"

    x = torch.cat(held.x_RD)
    gate, up, down = (one.float() for one in expert[1:])
    q = {name: nvfp4.dequantize(one) for name, one in made["max"].items()}
    y = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    z = (torch.nn.functional.silu(x @ q["gate_proj"].T) * (x @ q["up_proj"].T)) @ q["down_proj"].T
    wanted = float((z - y).square().sum() / y.square().sum())
    assert errors["max"].w4a16 == pytest.approx(wanted, rel=1e-4)


def test_the_layers_sample_judges_where_an_expert_has_too_few_tokens():
    expert, sample = make_expert(), torch.randn(64, HIDDEN)
    made = {"max": quantized("max")}
    few, none = (judge.output_errors(expert, made, held_out(n), sample) for n in (15, 0))
    assert few == none
    assert judge.output_errors(expert, made, held_out(16), sample) != none
