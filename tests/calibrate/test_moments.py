"""Second moments against what they are by definition, however tokens come."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourge.calibrate.kinds import ALL_COUNT, HOLD_OUT, MOST_HELD, Kind, moment_elements
from fourge.calibrate.moments import (
    ExpertInputs,
    HeldOut,
    LayerInputs,
    as_multiplied,
    counted,
    reduced,
)
from fourge.models.moe import Routed

HIDDEN, INNER = 48, 32
CONFIG: Any = SimpleNamespace(hidden_size=HIDDEN, moe_intermediate_size=INNER)
CPU = torch.device("cpu")
EXPERT = {
    "gate_proj": torch.randn(INNER, HIDDEN, generator=torch.Generator().manual_seed(1)),
    "up_proj": torch.randn(INNER, HIDDEN, generator=torch.Generator().manual_seed(2)),
}


def tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of gate and up, of down, and routing weights."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(count, HIDDEN, generator=generator)
    h_NI = torch.randn(count, INNER, generator=generator)
    return x_ND, h_NI, torch.rand(count, generator=generator) + 0.1


def layer_of(count: int, kind: Kind, seed: int = 9) -> LayerInputs:
    x_TD, _, gate_T = tokens(count, seed)
    layer = LayerInputs(kind, CONFIG, count, CPU)
    layer.note(Routed(x_TD, torch.zeros(count, 1, dtype=torch.long), gate_T[:, None], x_TD), 0)
    return layer


def expected(x_NK: torch.Tensor, gate_N: torch.Tensor) -> torch.Tensor:
    """The full moment, from its definition."""
    weight_N = gate_N.double().square()
    x_NK = as_multiplied(x_NK).double()
    return torch.einsum("n,ni,nj->ij", weight_N, x_NK, x_NK) / weight_N.sum()


def blocks_of(full_KK: torch.Tensor) -> torch.Tensor:
    ends = range(0, len(full_KK), 16)
    return torch.stack([full_KK[start : start + 16, start : start + 16] for start in ends])


def test_a_smaller_kind_is_part_of_a_larger_one():
    full = torch.randn(48, 48)
    assert torch.equal(reduced(full, Kind.BLOCKS), blocks_of(full))
    assert torch.equal(reduced(full, Kind.DIAGONAL), full.diagonal())
    assert torch.equal(reduced(blocks_of(full), Kind.DIAGONAL), full.diagonal())
    assert reduced(full, Kind.NONE).numel() == 0
    for kind in Kind:
        assert reduced(full, kind).numel() == moment_elements(kind, 48)


@pytest.mark.parametrize("kind", [Kind.DIAGONAL, Kind.BLOCKS, Kind.FULL])
def test_moments_of_many_tokens_are_nearly_the_experts_own(kind: Kind):
    """The prior has its share, k / (n + k), and no more; held-out tokens have none."""
    count = 4000
    x_ND, h_NI, gate_N = tokens(count, 3)
    h_NI[:, 0] = 30.0  # unlike anything that the layer's sample gives
    inputs, layer = ExpertInputs(kind, CONFIG, CPU), layer_of(300, kind)
    inputs.observe(x_ND, h_NI, gate_N)
    measures = inputs.measures(kind, layer, EXPERT)
    fitted = torch.arange(count) % HOLD_OUT != HOLD_OUT - 1
    strength = {Kind.DIAGONAL: 64, Kind.BLOCKS: 64, Kind.FULL: 2 * HIDDEN}[kind]
    share = strength / (int(fitted.sum()) + strength)
    own = reduced(expected(x_ND[fitted], gate_N[fitted]).float(), kind)
    wanted = own * (1 - share) + layer.moment(kind) * share
    torch.testing.assert_close(measures.gate_up, wanted, rtol=2e-3, atol=2e-3)
    down = reduced(measures.down, Kind.DIAGONAL)
    assert 0.9 * 900 < float(down[0]) < 1.1 * 900


@pytest.mark.parametrize("kind", [Kind.DIAGONAL, Kind.BLOCKS, Kind.FULL])
def test_an_expert_without_tokens_gets_what_the_layers_would_be_to_it(kind: Kind):
    inputs, layer = ExpertInputs(kind, CONFIG, CPU), layer_of(300, kind)
    measures = inputs.measures(kind, layer, EXPERT)
    torch.testing.assert_close(measures.gate_up, layer.moment(kind))
    x_RD = layer.sample()
    gate, up = (x_RD @ EXPERT[name].T for name in ("gate_proj", "up_proj"))
    h_RI = torch.nn.functional.silu(gate) * up
    wanted = reduced(expected(h_RI, torch.ones(len(h_RI))).float(), kind)
    torch.testing.assert_close(measures.down, wanted, rtol=1e-3, atol=1e-3)


def test_the_layers_moment_weighs_tokens_by_their_routing_weights():
    x_TD, _, gate_T = tokens(50, 4)
    layer = LayerInputs(Kind.FULL, CONFIG, 50, CPU)
    gates_TK = torch.stack([gate_T, 2 * gate_T], 1)
    layer.note(Routed(x_TD, torch.zeros(50, 2, dtype=torch.long), gates_TK, x_TD), 0)
    wanted = expected(x_TD, gate_T)
    torch.testing.assert_close(layer.moment(Kind.FULL).double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pieces", [[400], [1] * 400, [7, 1, 200, 192]])
def test_held_out_tokens_do_not_depend_on_how_tokens_come(pieces: list[int]):
    x_ND, h_NI, gate_N = tokens(400, 5)
    inputs = ExpertInputs(Kind.NONE, CONFIG, CPU)
    start = 0
    for piece in pieces:
        rows = slice(start, start + piece)
        inputs.observe(x_ND[rows], h_NI[rows], gate_N[rows])
        start += piece
    held = inputs.held_out
    assert torch.equal(torch.cat(held.x_RD), x_ND[HOLD_OUT - 1 :: HOLD_OUT])
    assert torch.equal(torch.cat(held.gate_R), gate_N[HOLD_OUT - 1 :: HOLD_OUT])


def test_a_full_reservoir_is_spread_over_all_that_came():
    held = HeldOut()
    for start in range(0, 5000, 100):
        numbers = torch.arange(start, start + 100).float()
        held.meet(numbers[:, None], numbers)
        assert held.kept == sum(map(len, held.x_RD)) <= MOST_HELD
    kept = torch.cat(held.gate_R)
    assert MOST_HELD / 2 < len(kept) <= MOST_HELD
    assert len(kept.diff().unique()) == 1, "evenly"
    assert float(kept[-1]) > 4900
    assert float(kept[0]) < 50


@pytest.mark.parametrize("piece", [1 << 14, (1 << 15) + 1, 99_991, 700_000])
def test_later_tokens_count_less_often_and_as_much(piece: int):
    """However they come: each stretch twice as long as the last, with half as many of it."""
    total, found = 700_000, []
    for first in range(0, total, piece):
        for rows, stride in counted(first, min(piece, total - first)):
            found += [(first + row, stride) for row in range(rows.start, rows.stop, rows.step)]
    numbers = [number for number, _ in found]
    assert numbers == sorted(set(numbers))
    assert numbers[:ALL_COUNT] == list(range(ALL_COUNT))
    assert abs(sum(stride for _, stride in found) - total) < 16
    for number, stride in found:
        stretch = (number // ALL_COUNT + 1).bit_length() - 1
        assert stride == 1 << stretch
    assert len(found) < 5 * ALL_COUNT
