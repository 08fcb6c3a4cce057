"""Statistics are those of a direct computation, per pass and expert."""

from pathlib import Path

import pytest
import torch

from fourge.calibrate.observe import LayerStatistics
from fourge.calibrate.routing import layer_record, saturation, summarize
from fourge.errors import CheckpointError

CPU = torch.device("cpu")


def empty() -> LayerStatistics:
    return LayerStatistics.empty(passes=2, experts=3, hidden=8, inner=4, device=CPU)


def test_figures_equal_a_direct_computation():
    torch.manual_seed(0)
    statistics = empty()
    x_ND, h_NF = torch.randn(10, 8), torch.randn(10, 4)
    observe = statistics.observer(1)
    gate_N = torch.ones(len(x_ND))
    observe(2, x_ND[:3], h_NF[:3], gate_N[:3])
    observe(2, x_ND[3:], h_NF[3:], gate_N[3:])
    assert statistics.tokens.tolist() == [[0, 0, 0], [0, 0, 10]]
    assert statistics.gate_up_amax[1, 2] == x_ND.abs().max()
    assert statistics.down_amax[1, 2] == h_NF.abs().max()
    torch.testing.assert_close(statistics.gate_up_square_sum[1, 2], x_ND.square().sum(0))
    torch.testing.assert_close(statistics.down_square_sum[1, 2], h_NF.square().sum(0))
    assert statistics.layer_amax() == (float(x_ND.abs().max()), float(h_NF.abs().max()))
    assert statistics.never_seen() == [0, 1]


def test_statistics_survive_saving(tmp_path: Path):
    statistics = empty()
    statistics.observer(0)(1, torch.ones(2, 8), torch.ones(2, 4) * 3, torch.ones(2))
    statistics.save(tmp_path / "layer.safetensors")
    loaded = LayerStatistics.load(tmp_path / "layer.safetensors")
    for name in LayerStatistics.__dataclass_fields__:
        assert torch.equal(getattr(loaded, name), getattr(statistics, name))
    first = (tmp_path / "layer.safetensors").read_bytes()
    statistics.save(tmp_path / "layer.safetensors")
    assert (tmp_path / "layer.safetensors").read_bytes() == first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_stop_the_run(value: float):
    statistics = empty()
    x_ND = torch.ones(2, 8)
    statistics.observer(0)(0, x_ND, torch.ones(2, 4), torch.ones(2))
    statistics.check_finite(5)
    x_ND[1, 1] = value
    statistics.observer(0)(0, x_ND, torch.ones(2, 4), torch.ones(2))
    with pytest.raises(CheckpointError, match="activations of layer 5 are not finite"):
        statistics.check_finite(5)


def test_coverage_counts_over_passes_and_names_the_unseen():
    statistics = empty()
    statistics.observer(0)(0, torch.ones(2, 8), torch.ones(2, 4), torch.ones(2))
    statistics.observer(1)(0, torch.ones(3, 8), torch.ones(3, 4), torch.ones(3))
    statistics.observer(1)(2, torch.ones(1, 8), torch.ones(1, 4), torch.ones(1))
    record = layer_record(7, ("coding", "broad"), statistics)
    assert record["never_seen"] == [1]
    assert record["passes"]["broad"]["tokens"] == [3, 0, 1]
    assert summarize([record]) == (3, 0, 1, 1)
    assert summarize([]) == (0, 0, 0.0, 0)


def test_first_seen_counts_tokens_up_to_the_first_of_each_expert():
    statistics = empty()
    statistics.note_first_seen(torch.tensor([[2], [2], [0]]), 0)
    assert statistics.first_seen.tolist() == [3, 0, 1]
    statistics.note_first_seen(torch.tensor([[0], [1], [1]]), 3)
    assert statistics.first_seen.tolist() == [3, 5, 1]


def test_saturation_counts_the_experts_of_all_layers():
    layers = [{"first_seen": [1, 3, 0]}, {"first_seen": [2, 5, 9]}]
    curve = saturation(layers, 10)
    seen = dict(zip(curve["tokens"], curve["experts_seen"], strict=True))
    assert (seen[1], seen[2], seen[4], seen[8], seen[10]) == (1, 2, 3, 4, 5)
    assert list(seen) == sorted(seen)
    assert saturation([], 1) == {"tokens": [1], "experts_seen": [0]}
