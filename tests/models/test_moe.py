import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fourge.models import chunks
from fourge.models.config import ModelConfig, from_dict
from fourge.models.moe import Routed, route, run_experts

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def twin(make_twin: Callable[..., Any]) -> Any:
    return make_twin("glm_moe_dsa")


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(90, 64, generator=torch.Generator().manual_seed(0))


def one_hot_router(config: ModelConfig, bias: torch.Tensor) -> Weights:
    """A router whose scores are all sigmoid(0), so that the bias alone chooses."""
    return {
        "post_attention_layernorm.weight": torch.ones(config.hidden_size),
        "mlp.gate.weight": torch.zeros(config.n_routed_experts, config.hidden_size),
        "mlp.gate.e_score_correction_bias": bias,
    }


def router_config(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return from_dict(raw | {"n_shared_experts": 0} | changes)


def test_the_bias_is_compared_in_float32(raw_config: dict[str, Any], hidden: torch.Tensor) -> None:
    """The biases of GLM-5.1 lie 12-35 high and a few bfloat16 steps apart."""
    config = router_config(raw_config)
    bias = 20 + 0.008 * torch.tensor([3.0, 7, 1, 0, 6, 2, 5, 4])
    assert len(bias.bfloat16().unique()) == 1
    routed = route(hidden, one_hot_router(config, bias), config)
    assert routed.experts_TK.sort().values.tolist() == [[1, 4, 6]] * 90
    low_precision = route(hidden.bfloat16(), one_hot_router(config, bias), config)
    assert torch.equal(low_precision.experts_TK, routed.experts_TK)


def test_the_bias_chooses_but_does_not_weigh(
    raw_config: dict[str, Any], hidden: torch.Tensor
) -> None:
    config = router_config(raw_config)
    bias = torch.arange(8).float()
    routed = route(hidden, one_hot_router(config, bias), config)
    assert routed.gates_TK.dtype == torch.float32
    assert torch.allclose(routed.gates_TK, torch.full((90, 3), 2.5 / 3))


def test_gates_are_scaled_once_and_not_normed_when_the_config_says_so(
    raw_config: dict[str, Any], hidden: torch.Tensor
) -> None:
    config = router_config(raw_config, norm_topk_prob=False)
    routed = route(hidden, one_hot_router(config, torch.zeros(8)), config)
    assert torch.allclose(routed.gates_TK, torch.full((90, 3), 0.5 * 2.5))


def test_groups_are_ranked_by_the_sum_of_their_two_best_experts(
    raw_config: dict[str, Any], hidden: torch.Tensor
) -> None:
    config = router_config(raw_config, n_group=2, topk_group=1)
    # The single best expert is in the first group; the best pair, and so all three, in the second.
    bias = torch.tensor([9.0, 0, 0, 0, 5, 5, 4, 0])
    routed = route(hidden, one_hot_router(config, bias), config)
    assert routed.experts_TK.sort().values.tolist() == [[4, 5, 6]] * 90


def test_the_router_of_a_low_precision_run_computes_in_float32(
    twin: Any, hidden: torch.Tensor
) -> None:
    weights = twin.layer_weights(1)
    routed = route(hidden.bfloat16(), weights, twin.config)
    scores = torch.sigmoid(routed.x_TD.float() @ weights["mlp.gate.weight"].T)
    gates = scores.gather(1, routed.experts_TK)
    gates = 2.5 * gates / gates.sum(1, keepdim=True)
    assert torch.allclose(routed.gates_TK, gates, atol=1e-5, rtol=0)


def test_the_sum_starts_with_residual_and_shared_experts(twin: Any, hidden: torch.Tensor) -> None:
    weights = twin.layer_weights(1)
    routed = route(hidden, weights, twin.config)
    x, shared = routed.x_TD, "mlp.shared_experts."
    inner = F.silu(x @ weights[f"{shared}gate_proj.weight"].T)
    inner = inner * (x @ weights[f"{shared}up_proj.weight"].T)
    expected = hidden + inner @ weights[f"{shared}down_proj.weight"].T
    assert torch.allclose(routed.acc_TD, expected, atol=1e-5)
    half = route(hidden.bfloat16(), weights, twin.config)
    assert half.x_TD.dtype == torch.bfloat16
    assert half.acc_TD.dtype == torch.float32


def test_routing_leaves_the_hidden_states_alone(twin: Any, hidden: torch.Tensor) -> None:
    before = hidden.clone()
    run_experts(route(hidden, twin.layer_weights(1), twin.config), twin.layer_weights(1), range(8))
    assert torch.equal(hidden, before)


def sum_of_experts(twin: Any, hidden: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    weights = twin.layer_weights(1)
    routed = route(hidden, weights, twin.config)
    for start, stop in itertools.pairwise(bounds):
        held = {
            name: tensor
            for name, tensor in weights.items()
            if any(name.startswith(f"mlp.experts.{expert}.") for expert in range(start, stop))
        }
        run_experts(routed, held, range(start, stop))
    return routed.acc_TD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 5, 8], [0, 0, 7, 8]])
def test_every_split_of_the_experts_gives_the_same_bits(
    twin: Any, hidden: torch.Tensor, bounds: list[int], dtype: torch.dtype
) -> None:
    hidden = hidden.to(dtype)
    whole = sum_of_experts(twin, hidden, [0, 8])
    assert torch.equal(whole, sum_of_experts(twin, hidden, bounds))


def observed(
    twin: Any, routed: Routed, **options: Any
) -> list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    calls: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    used = {f"mlp.experts.{expert}" for expert in routed.experts_TK.unique().tolist()}
    weights = twin.layer_weights(1).items()
    run_experts(
        routed,
        # An expert without tokens is not even looked up.
        {name: tensor for name, tensor in weights if name.rsplit(".", 2)[0] in used},
        range(8),
        observe=lambda expert, x_ND, h_NI, gate_N: calls.append((expert, x_ND, h_NI, gate_N)),
        **options,
    )
    return calls


def test_the_observer_sees_each_expert_once_with_its_tokens_in_order(
    twin: Any, hidden: torch.Tensor
) -> None:
    weights = twin.layer_weights(1)
    routed = route(hidden, weights, twin.config)
    routed.experts_TK[routed.experts_TK == 5] = 4  # so that expert 5 gets nothing
    calls = observed(twin, routed)
    assert [expert for expert, *_ in calls] == [0, 1, 2, 3, 4, 6, 7]
    for expert, x_ND, h_NI, gate_N in calls:
        tokens, choices = (routed.experts_TK == expert).nonzero(as_tuple=True)
        assert torch.equal(gate_N, routed.gates_TK[tokens, choices])
        assert torch.equal(x_ND, routed.x_TD[tokens])
        stem = f"mlp.experts.{expert}."
        gate, up = (x_ND @ weights[f"{stem}{name}_proj.weight"].T for name in ("gate", "up"))
        assert torch.allclose(h_NI, F.silu(gate) * up, atol=1e-5)
    assert sum(len(x_ND) for _, x_ND, *_ in calls) == 90 * 3


def test_an_expert_with_many_tokens_is_run_in_pieces(
    twin: Any, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = twin.layer_weights(1)
    whole, pieces = (route(hidden, weights, twin.config) for _ in range(2))
    run_experts(whole, weights, range(8))
    monkeypatch.setattr(chunks, "EXPERT_ROWS", 7)
    monkeypatch.setattr(chunks, "ROWS", 11)
    calls = observed(twin, pieces)
    assert max(len(x_ND) for _, x_ND, *_ in calls) == 7
    assert sum(len(x_ND) for _, x_ND, *_ in calls) == 90 * 3
    assert torch.allclose(whole.acc_TD, pieces.acc_TD, atol=1e-5)
    again = route(hidden, weights, twin.config)
    assert torch.equal(again.experts_TK, whole.experts_TK)


def test_experts_in_low_precision_are_summed_in_float32(twin: Any) -> None:
    """256 + 2^-3 is lost in bfloat16, whose step there is 2."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in twin.layer_weights(1).items()}
    weights["mlp.experts.2.gate_proj.weight"][:, 0] = 30.0
    weights["mlp.experts.2.up_proj.weight"][:, 0] = 1.0
    weights["mlp.experts.2.down_proj.weight"][:, 0] = 0.125 / 30
    x_TD = torch.zeros(1, 64).bfloat16()
    x_TD[0, 0] = 1.0
    routed = Routed(x_TD, torch.tensor([[2]]), torch.ones(1, 1), torch.full((1, 64), 256.0))
    run_experts(routed, weights, range(8))
    assert routed.acc_TD.dtype == torch.float32
    assert torch.allclose(routed.acc_TD - 256, torch.full((1, 64), 0.125), atol=1e-3)
