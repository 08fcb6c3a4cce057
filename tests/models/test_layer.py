"""Attention in pieces: packing, chunk sizes, sharing, memory."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fourge.models import chunks, dsa, mla
from fourge.models import layer as layers
from fourge.models.config import from_dict
from fourge.models.norm import rms_norm

Twin = Any


@pytest.fixture(scope="module")
def twin(make_twin: Callable[..., Any]) -> Twin:
    return make_twin("glm_moe_dsa", index_topk_pattern="FSFF")


def attend(
    twin: Twin, layer: int, hidden: torch.Tensor, lengths: list[int], topk: layers.TopK | None
) -> tuple[torch.Tensor, layers.TopK]:
    rope = layers.rope_table(twin.config, max(lengths), "cpu")
    weights = twin.layer_weights(layer)
    return layers.attend(hidden, lengths, weights, twin.config, layer, rope, topk)


def hidden_states(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, 64, generator=torch.Generator().manual_seed(seed))


def test_packed_sequences_do_not_see_each_other(twin: Twin) -> None:
    lengths = [70, 20, 1, 128]
    hidden = hidden_states(sum(lengths))
    packed, topk = attend(twin, 0, hidden, lengths, None)
    for number, part in enumerate(hidden.split(lengths)):
        alone, alone_topk = attend(twin, 0, part, [len(part)], None)
        assert torch.allclose(packed.split(lengths)[number], alone, atol=1e-6, rtol=0)
        selected, expected = topk[number], alone_topk[0]
        assert (selected is None) == (expected is None) == (len(part) <= 32)
        if selected is not None and expected is not None:
            assert torch.equal(selected.sort().values, expected.sort().values)


def test_sequences_of_one_length_side_by_side_are_as_if_alone(twin: Twin) -> None:
    lengths = [50, 50, 50, 20, 20, 50]
    assert list(chunks.runs(lengths)) == [(0, 3), (3, 2), (5, 1)]
    hidden = hidden_states(sum(lengths))
    given: list[torch.Tensor | None] | None = None
    for layer in (0, 1):  # layer 1 shares the selection of layer 0
        together, topk = attend(twin, layer, hidden, lengths, given)
        for number, part in enumerate(hidden.split(lengths)):
            own = None if given is None else [given[number]]
            alone, alone_topk = attend(twin, layer, part, [len(part)], own)
            assert torch.allclose(together.split(lengths)[number], alone, atol=1e-6, rtol=0)
            selected, expected = topk[number], alone_topk[0]
            assert (selected is None) == (expected is None) == (len(part) <= 32)
            if selected is not None and expected is not None:
                assert torch.equal(selected.sort().values, expected.sort().values)
        given = list(topk)


def test_a_run_of_sequences_is_bounded() -> None:
    assert list(chunks.runs([chunks.RUN_TOKENS // 2] * 5)) == [(0, 2), (2, 2), (4, 1)]
    assert list(chunks.runs([chunks.RUN_TOKENS * 2] * 2)) == [(0, 1), (1, 1)]
    assert list(chunks.runs((3, 3))) == [(0, 2)]


def test_a_selection_holds_index_topk_earlier_positions_once_each(twin: Twin) -> None:
    _, (topk,) = attend(twin, 0, hidden_states(100), [100], None)
    assert topk is not None
    assert topk.shape == (100, 32)
    assert topk.dtype == torch.int32
    for position, row in enumerate(topk.tolist()):
        chosen = [index for index in row if index != -1]
        assert len(set(chosen)) == len(chosen) == min(32, position + 1)
        assert max(chosen) <= position


def test_a_shared_layer_uses_the_selection_it_is_given_and_hands_it_on(twin: Twin) -> None:
    hidden = hidden_states(100)
    _, first = attend(twin, 0, hidden, [100], None)
    _, second = attend(twin, 2, hidden, [100], None)
    by_first, passed = attend(twin, 1, hidden, [100], first)
    by_second, _ = attend(twin, 1, hidden, [100], second)
    assert passed[0] is not None
    assert first[0] is not None
    assert torch.equal(passed[0], first[0])
    assert (by_first - by_second).abs().max() > 1e-2


def test_a_full_layer_ignores_the_selection_it_is_given(twin: Twin) -> None:
    hidden = hidden_states(100)
    alone, _ = attend(twin, 2, hidden, [100], None)
    wrong = [torch.zeros(100, 32, dtype=torch.int32)]
    given, _ = attend(twin, 2, hidden, [100], wrong)
    assert torch.equal(alone, given)


def test_the_indexer_of_a_low_precision_run_keeps_its_float32_weights(twin: Twin) -> None:
    hidden, weights, config = hidden_states(100).bfloat16(), twin.layer_weights(0), twin.config
    _, (topk,) = attend(twin, 0, hidden, [100], None)
    rope = layers.rope_table(config, 100, "cpu")
    x = rms_norm(hidden, weights["input_layernorm.weight"], config.rms_norm_eps)
    latents = mla.project(x[None], weights, config, rope)
    index = dsa.project(x[None], weights, config, rope)
    (expected,) = dsa.select(latents.query_MLQ, index, weights, config, rope)
    assert topk is not None
    assert torch.equal(topk.sort().values, expected.sort().values)


def test_a_selection_of_every_position_is_plain_causal_attention(twin: Twin) -> None:
    hidden = hidden_states(32)
    full, topk = attend(twin, 1, hidden, [32], [None])
    position = torch.arange(32, dtype=torch.int32)
    everything = torch.where(position <= position[:, None], position, -1)
    selected, _ = attend(twin, 1, hidden, [32], [everything])
    assert topk == [None]
    assert torch.allclose(full, selected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("index_topk", [32, 200], ids=["selecting", "attending to all"])
def test_chunk_sizes_do_not_change_the_result(
    make_twin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, index_topk: int
) -> None:
    twin = make_twin("glm_moe_dsa", index_topk=index_topk)
    hidden = hidden_states(150)
    whole, topk = attend(twin, 0, hidden, [150], None)
    monkeypatch.setattr(chunks, "ROWS", 17)
    monkeypatch.setattr(chunks, "HEAD_ELEMENTS", 3 * 150 * (2 * 32 + 56 + 2 * 32))
    monkeypatch.setattr(chunks, "SCORE_ELEMENTS", 1)
    monkeypatch.setattr(chunks, "MIN_QUERIES", 13)
    assert chunks.head_group(twin.config, 150) == 2
    assert chunks.attention_queries(twin.config, 1, 150) == 13
    assert chunks.index_queries(1, 150) == 13
    pieces, pieces_topk = attend(twin, 0, hidden, [150], None)
    assert torch.allclose(whole, pieces, atol=2e-6, rtol=0)
    if index_topk == 32:
        assert topk[0] is not None
        assert pieces_topk[0] is not None
        assert torch.equal(topk[0].sort().values, pieces_topk[0].sort().values)


def test_chunks_of_the_real_model_are_bounded(raw_config: dict[str, Any]) -> None:
    big = {
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "index_head_dim": 128,
    }
    config = from_dict(raw_config | big)
    assert chunks.head_group(config, 1024) == 22
    for length in (8192, 65536):
        group = chunks.head_group(config, length)
        # A single head and 256 queries are the least there can be.
        assert group * chunks.head_elements(config, length) <= max(1 << 25, length * 1472)
        scores = group * length * chunks.attention_queries(config, 1, length)
        assert scores <= max(1 << 22, group * length * 256)
        assert length * chunks.index_queries(1, length) <= max(1 << 22, length * 256)


def test_dense_mlp_in_row_chunks_equals_the_whole(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weights = hidden_states(50), twin.layer_weights(0)
    whole = layers.dense_mlp(hidden, weights, twin.config)
    monkeypatch.setattr(chunks, "ROWS", 7)
    assert torch.allclose(layers.dense_mlp(hidden, weights, twin.config), whole, atol=2e-6, rtol=0)


def test_a_decoder_layer_is_its_three_parts_composed(twin: Twin) -> None:
    hidden, weights, config = hidden_states(60), twin.layer_weights(3), twin.config
    rope = layers.rope_table(config, 60, "cpu")
    whole, topk = layers.decoder_layer(hidden, [40, 20], weights, config, 3, rope, None)
    attended, attended_topk = layers.attend(hidden, [40, 20], weights, config, 3, rope, None)
    routed = layers.route(attended, weights, config)
    layers.run_experts(routed, weights, range(8))
    assert torch.equal(whole, routed.acc_TD)
    assert torch.equal(topk[0], attended_topk[0])


_LONG_RUN = """
import resource, torch
from fourge.models import layer
from fourge.models.config import from_dict
from fourge.models.norm import rms_norm
from fourge.models.tensors import layer_shapes
config = from_dict({raw!r})
torch.manual_seed(0)
weights = {{name: torch.randn(shape) * 0.1 for name, shape in layer_shapes(config, 0).items()}}
hidden = torch.randn({length}, config.hidden_size)
rope = layer.rope_table(config, {length}, "cpu")
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.inference_mode():
    layer.decoder_layer(hidden[:64], [64], weights, config, 0, rope, None)
    before = peak()
    out, topk = layer.decoder_layer(hidden, [{length}], weights, config, 0, rope, None)
assert out.isfinite().all() and topk[0].shape == ({length}, config.index_topk)
print(peak() - before)
"""


def test_a_long_sequence_never_holds_heads_times_length_squared(raw_config: dict[str, Any]) -> None:
    length, heads = 16384, 4
    raw = raw_config | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "index_topk": 128,
        "index_n_heads": 2,
        "num_hidden_layers": 1,
    }
    script = _LONG_RUN.format(raw=raw, length=length)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # [heads, T, T] in float32 would be 4.3 GB, [T, T] 1.1 GB.
    assert int(run.stdout) < 600e6
